"""Rows of a benchmark as prompts, word for word, and what is said of a row that cannot be asked."""

from pathlib import Path
from typing import Any

import pytest

from dataset import DataError
from evaluation.items import Item, Prompt, messages, prompts, read_items, written_answer
from tests.evaluation.questions import write_questions
from tests.helpers import write_jsonl

ROW: dict[str, Any] = {"kind": "choice", "question": "What is ice?", "choices": ["water", "stone"], "answer": 0}


def read(folder: Path, *rows: dict[str, Any], **how: int) -> list[Item]:
    return read_items(write_jsonl(folder / "rows.jsonl", list(rows)), **how)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, [("Question: What is ice?\nAnswer:", " water"), ("Question: What is ice?\nAnswer:", " stone")]),
        (
            {"question": "冰是什么？", "choices": ["水", "石头"]},
            [("问题：冰是什么？\n答案：", " 水"), ("问题：冰是什么？\n答案：", " 石头")],
        ),
        (
            {"question": "Passage: cold\nQuestion: is it?", "choices": ["no", "yes"]},
            [("Passage: cold\nQuestion: is it?\nAnswer:", " no"), ("Passage: cold\nQuestion: is it?\nAnswer:", " yes")],
        ),
        (
            {"task": "copa", "question": "It froze, so", "choices": ["I slid.", "I sank."]},
            [("It froze, so", " I slid."), ("It froze, so", " I sank.")],
        ),
        (
            {"question": "", "choices": ["the cat sat down", "the dog sat down"], "suffix": "sat down"},
            [("the cat ", "sat down"), ("the dog ", "sat down")],
        ),
        ({"question": "", "choices": ["one", "two"]}, [("", "one"), ("", "two")]),
        ({"kind": "cloze", "question": "I slid on the", "answer": "ice"}, [("I slid on the", " ice")]),
        ({"kind": "generate", "question": "2+2?", "answer": "4"}, [("Question: 2+2?\nAnswer:", " 4")]),
    ],
)  # fmt: skip
def test_prompts_word_for_word(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    (item,) = read(tmp_path, ROW | row)
    assert prompts(item) == [Prompt(*each) for each in expected]


def test_examples_of_the_own_subject_stand_before_in_both_forms(tmp_path: Path) -> None:
    about = [{"subject": subject, "question": f"{subject} {i}?"} for i in range(3) for subject in ("plants", "stars")]
    write_jsonl(tmp_path / "rows.fewshot.jsonl", [ROW | each for each in about])
    (item,) = read(tmp_path, ROW | {"subject": "stars"}, shots=2)
    before = "Question: stars 0?\nAnswer: water\n\nQuestion: stars 1?\nAnswer: water\n\n"
    assert prompts(item)[1] == (before + "Question: What is ice?\nAnswer:", " stone")
    said = [(each["role"], each["content"]) for each in messages(item)]
    assert said[:2] == [("user", "stars 0?"), ("assistant", "water")] and said[-1] == ("user", "What is ice?")
    assert len(said) == 5
    with pytest.raises(ValueError, match=r"others.jsonl: --shots 2 takes its examples from others.fewshot.jsonl"):
        read_items(write_jsonl(tmp_path / "others.jsonl", [ROW]), shots=2)


def test_what_a_row_may_leave_out_comes_from_where_it_stands(tmp_path: Path) -> None:
    (item, other) = read(tmp_path, ROW, ROW | {"question": "冰？"})
    assert (item.id, item.task, item.subject, item.lang, item.chance) == ("rows:1", "rows", "", "en", 0.5)
    assert (other.id, other.lang) == ("rows:2", "zh")
    assert [each.id for each in read(tmp_path, ROW, ROW, max_rows=1)] == ["rows:1"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": 2}, r"rows.jsonl:1: found the answer 2, expected a choice's number, 0 to 1"),
        ({"answer": True}, "found the answer True, expected a choice's number"),
        ({"choices": ["one"]}, "expected a list of two texts or more"),
        ({"choices": ["one", " "]}, "expected a list of two texts or more"),
        ({"kind": "essay"}, "found the kind 'essay', expected one of choice, cloze, generate"),
        ({"lang": "fr"}, "found the lang 'fr', expected one of en, zh"),
        ({"question": 3}, "found question of type int, expected a text"),
        ({"kind": "cloze", "answer": 3}, "found the answer 3, expected a text"),
        ({"kind": "generate", "answer": "3", "question": ""}, "found no question for an answer of kind generate"),
        ({"suffix": "er"}, "found the choice 'stone', expected a beginning and then the suffix 'er'"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(tmp_path, ROW | row)


def test_an_id_stands_once_and_a_row_has_its_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: found the id 'a' a second time"):
        read(tmp_path, ROW | {"id": "a"}, ROW | {"id": "a"})
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl: no such file; expected one of rows like .*choices"):
        read_items(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl:1: found no answer, expected .*choices"):
        read(tmp_path, {"kind": "choice", "question": "?"})


def test_what_is_written_after_the_answer_is_no_part_of_it(tmp_path: Path) -> None:
    files = write_questions(tmp_path, count=1)
    (item,) = read_items(files["sum"])
    assert written_answer(item, " 4\n\nQuestion: 5 + 5?\nAnswer: 10") == " 4\n"
