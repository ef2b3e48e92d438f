"""Benchmarks of a model that knows a few answers by heart, scores counted by hand, and ranks in real processes."""

import math
from pathlib import Path

import pytest

from dataset import DataError, Tokenizer
from evaluation.benchmark import How, Outcome, judge_files, scores_of
from evaluation.calibration import interval
from evaluation.items import prompts, read_items
from model import GPT, load_pretrained
from tests.evaluation.questions import write_questions
from tests.evaluation.test_likelihood import alone
from tests.helpers import write_jsonl
from tests.memorised import assistant, make_memorised, user

TALKS = [
    [user("What is ice?"), assistant("water")],
    [user("冰是什么？"), assistant("水")],
    [user("2+2?"), assistant("It is 4.")],
]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> GPT:
    return load_pretrained(make_memorised(tmp_path_factory.mktemp("knowing"), TALKS))


def test_what_is_known_by_heart_is_right_when_it_is_asked_as_it_was_learnt(
    knowing: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"kind": "choice", "question": "What is ice?", "choices": ["stone", "water"], "answer": 1},
        {"kind": "choice", "question": "冰是什么？", "choices": ["石头", "水", "木头"], "answer": 1},
        {"kind": "generate", "question": "2+2?", "answer": "4"},
        {"kind": "generate", "question": "2+2?", "answer": "5"},
        {"kind": "generate", "question": "What is ice?", "answer": "water"},
    ]
    run = judge_files(knowing, tokenizer, [write_jsonl(tmp_path / "rows.jsonl", rows)], How(chat=True))
    choices, written = run.outcomes[:2], run.outcomes[2:]
    assert [(each.right, each.right_by_length, each.choice) for each in choices] == [(True, True, 1)] * 2
    assert [each.right for each in written] == [True, False, True]
    assert [each.written for each in written] == ["It is 4.", "It is 4.", "water"]
    scores = {(each.group, each.name, each.kind): each for each in run.scores}
    assert (task := scores["task", "rows", "choice"]).accuracy == 1 and task.chance == pytest.approx(
        (1 / 2 + 1 / 3) / 2
    )
    assert (task.low, task.high) == interval(2, 2)
    assert scores["lang", "zh", "choice"].items == 1 and scores["task", "rows", "generate"].accuracy == 2 / 3
    assert (run.counts, run.notes) == ({}, [])


def test_plain_text_is_judged_token_by_token(make_model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Choices and clozes against sums over one whole sequence each."""
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    files = write_questions(tmp_path)
    for name in ("pick", "zh_pick", "copa", "fill", "last"):
        outcomes = judge_files(model, tokenizer, [files[name]], How(batch_size=4)).outcomes
        for item, outcome in zip(read_items(files[name]), outcomes, strict=True):
            nats = []
            for context, continuation in prompts(item):
                ids, kept = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip()))
                pair = type("Pair", (), {"ids": [tokenizer.bos_id, *ids], "start": 1 + kept})
                nats.append(alone(model, pair)[0])
            assert outcome.loglikelihoods == pytest.approx(nats, abs=1e-4)
            if item.kind == "choice":
                sizes = [len(item.suffix or each) for each in item.choices]
                by_length = [value / size for value, size in zip(nats, sizes, strict=True)]
                assert outcome.right == (nats.index(max(nats)) == item.answer)
                assert outcome.right_by_length == (by_length.index(max(by_length)) == item.answer)


def test_items_that_are_cut_or_do_not_fit_are_counted(make_model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"kind": "choice", "question": "red " * 99, "choices": ["yes", "no"], "answer": 0},
        {"kind": "choice", "question": "?", "choices": ["yes", "no " * 99], "answer": 0},
        {"kind": "generate", "question": "red " * 99, "answer": "1"},
        {"kind": "cloze", "question": "red", "answer": "fox"},
    ]
    model = make_model(vocab_size=tokenizer.vocab_size)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = judge_files(model, tokenizer, [path], How(max_new_tokens=4))
    assert [each.id for each in run.outcomes] == ["rows:1", "rows:3", "rows:4"]
    assert sorted(run.counts.values()) == [1, 2]
    alone = write_jsonl(tmp_path / "alone.jsonl", rows[1:2])
    with pytest.raises(ValueError, match=r"alone.jsonl: no item is left to judge"):
        judge_files(model, tokenizer, [alone], How())
    with pytest.raises(DataError, match="found an item of one task and id twice"):
        judge_files(model, tokenizer, [path, path], How())


def outcome(task: str, subject: str, lang: str, right: bool, **more) -> Outcome:
    return Outcome(f"{task}{subject}{lang}{right}", task, subject, lang, "choice", 0, right, 0.25, **more)


def test_scores_are_counted_by_task_subject_and_language() -> None:
    outcomes = [
        outcome("a", "x", "en", True, right_by_length=False),
        outcome("a", "y", "en", False, right_by_length=False),
        outcome("b", "", "zh", True, right_by_length=True),
        Outcome("d", "c", "", "en", "cloze", "cat", False, 0.0, loglikelihoods=[-6.0], tokens=[2]),
        Outcome("e", "c", "", "en", "cloze", "dog", True, 0.0, loglikelihoods=[-1.0], tokens=[1]),
    ]
    scores = scores_of(outcomes)
    found = {(each.group, each.name): each for each in scores}
    assert {key: each.items for key, each in found.items() if key[0] != "lang"} == {
        ("task", "a"): 2, ("task", "b"): 1, ("task", "c"): 2, ("subject", "a / x"): 1, ("subject", "a / y"): 1,
    }  # fmt: skip
    assert [(each.name, each.kind, each.items) for each in scores if each.group == "lang"] == [
        ("en", "choice", 2), ("zh", "choice", 1), ("en", "cloze", 2),
    ]  # fmt: skip
    assert (found["task", "a"].accuracy, found["task", "a"].accuracy_by_length, found["task", "a"].chance) == (
        0.5,
        0,
        0.25,
    )
    assert found["task", "c"].perplexity == pytest.approx(math.exp(7 / 3)) and found["task", "c"].chance == 0
