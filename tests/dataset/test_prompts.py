"""Rows of prompts: what MiniMind's reinforcement files look like, in our own words, and what else is read as one."""

import json
from pathlib import Path
from typing import Any

import pytest

from dataset import CONVERSATION, DEFAULT_TOKENIZER, PROMPT, DataError, load_tokenizer, render_chat
from dataset.encode import Rules, encode_parts
from dataset.forms import Form
from dataset.records import form_of, read_rows
from tests.helpers import write_jsonl

USER = {"role": "user", "content": "What is 6 x 7?"}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "calculate_math",
        "description": "算一个式子",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
RLAIF = {"conversations": [USER, {"role": "assistant", "content": ""}]}
AGENT: dict[str, Any] = {
    "conversations": [
        {"role": "system", "content": "你会用工具。", "tools": json.dumps([SCHEMA], ensure_ascii=False)},
        {"role": "user", "content": "6 乘 7，再加 0.5"},
        {"role": "assistant", "content": ""},
    ],
    "gt": ["42", 42.5],
}


def check(row: dict[str, Any], tmp_path: Path, form: Form = PROMPT) -> dict[str, Any]:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    ((found),) = read_rows([str(path)], form)
    return found.value


def test_the_last_turn_is_left_out_where_it_is_the_assistants(tmp_path: Path) -> None:
    assert check(RLAIF, tmp_path) == {"conversations": [USER], "answer": []}
    assert check({"conversations": [USER]}, tmp_path) == {"conversations": [USER], "answer": []}
    agent = check(AGENT, tmp_path)
    assert agent["conversations"] == AGENT["conversations"][:2]
    assert agent["answer"] == ["42", 42.5] == agent["gt"]


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"answer": "42"}, ["42"]),
        ({"gt": 42}, [42]),
        ({"answer": ["a", 1.5], "gt": "other"}, ["a", 1.5]),
        ({"answer": None, "gt": ["b"]}, ["b"]),
        ({}, ["forty-two"]),  # the answer of an SFT row
    ],
)
def test_the_answer_is_the_rows_own_or_the_turn_that_is_left_out(tmp_path: Path, given: dict, answer: list) -> None:
    row = {"conversations": [USER, {"role": "assistant", "content": "forty-two "}], "source": "mine"} | given
    found = check(row, tmp_path)
    assert found["answer"] == answer and found["source"] == "mine" and found["conversations"] == [USER]


def test_other_spellings_of_a_conversation_are_prompts_too(tmp_path: Path) -> None:
    for row in (
        {"messages": [USER], "answer": 42},
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "42"}]},
        {"instruction": USER["content"], "input": "", "output": "42"},
    ):
        found = check(row, tmp_path)
        assert found["conversations"] == [USER] and str(found["answer"][0]) == "42"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"role": "assistant", "content": "Hi"}]}, "found no message before the answer"),
        ({"conversations": [USER, *RLAIF["conversations"][1:] * 2]}, "found two answers in a row"),
        ({"conversations": [USER], "gt": {"a": 1}}, "found an object as the answer, expected a string, a number"),
        ({"conversations": [USER], "gt": [True]}, "found a boolean as the answer"),
        ({"conversations": [USER], "answer": float("nan")}, "found nan as the answer, expected a finite number"),
        ({"conversations": [USER | {"role": "asker"}]}, "found 'asker' as the role of conversations[0]"),
        ({"text": "Hi"}, "a row for train_pretrain.py, expected"),
        ({"prompt": "Hi"}, "found the keys 'prompt', expected"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        check(row, tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and message in str(error.value)


def test_columns_hold_the_prompts_tokens_and_the_row(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    long = {"conversations": [{"role": "user", "content": "a b c d " * 100}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [RLAIF, long, AGENT])
    encoded = encode_parts([str(path)], tokenizer, Rules(PROMPT, 192), tmp_path / "cache")["all"]
    columns, report = encoded.columns, encoded.report
    assert report.used == 2 and report.dropped == {"prompt longer than max_seq_len": 1} and report.supervised == 0
    assert columns["line"].to_pylist() == [1, 3]
    for ids, text, given in zip(columns["ids"].to_pylist(), columns["row"].to_pylist(), (RLAIF, AGENT), strict=True):
        row = json.loads(text)
        assert ids == render_chat(tokenizer, given["conversations"][:-1], add_generation_prompt=True).ids
        assert row["conversations"] == given["conversations"][:-1] and row["answer"] == given.get("gt", [])


def test_a_file_of_conversations_is_one_for_sft_unless_it_is_asked_for_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [AGENT])
    assert form_of(path) is CONVERSATION
    prompt, conversation = check(AGENT, tmp_path), check(AGENT, tmp_path, CONVERSATION)
    assert PROMPT.split_key(prompt) == CONVERSATION.split_key(conversation)  # held out under both, or under neither
