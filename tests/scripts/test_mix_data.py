"""A recipe of files and weights: what is written, how often, and what is left out of it."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dataset.encode import Rules, is_held_out
from dataset.records import one_line, read_rows
from scripts import mix_data
from tests.helpers import write_jsonl
from training import STAGES

CHATS = [
    [("system", "Be kind."), ("user", f"Who is {i}?"), ("assistant", f"I am {{{{name}}}}, {i}."), ("user", "Bye")]
    for i in range(40)
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "few.jsonl", [{"text": f"few {i}"} for i in range(5)])
    write_jsonl(tmp_path / "many.jsonl", [{"text": f"many {i}"} for i in range(400)])
    turns = ([{"role": role, "content": content} for role, content in chat] for chat in CHATS)
    write_jsonl(tmp_path / "chats.jsonl", [{"conversations": chat} for chat in turns])
    return tmp_path / "recipe.yaml"


@pytest.fixture
def mix(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """mix(lines, flags) -> rows that are written, and what is said."""

    def run(lines: str, *flags: str, stage: str = "pretrain") -> tuple[list[dict], str]:
        recipe.write_text(lines)
        output = recipe.parent / "out" / "mix.jsonl"
        arguments = [recipe, "--stage", stage, "--output", output, *flags]
        monkeypatch.setattr(sys, "argv", ["mix_data.py", *map(str, arguments)])
        mix_data.main()
        return [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().err

    return run


def test_weights_are_copies_and_shares(mix):
    rows, told = mix("few.jsonl: 2\nmany.jsonl: 1.25\n")
    times = Counter(row["text"] for row in rows)
    assert [times[f"few {i}"] for i in range(5)] == [2] * 5
    many = [times[f"many {i}"] for i in range(400)]
    assert set(many) == {1, 2} and 60 < many.count(2) < 140  # a quarter, by hash
    assert mix("few.jsonl: 2\nmany.jsonl: 1.25\n")[0] == rows
    assert f"{sum(many):,}" in told and "400" in told  # the table counts rows read and written


def test_conversations_as_text_leave_out_what_fine_tuning_holds_out(mix, recipe):
    rules = Rules(STAGES["full_sft"].form, max_seq_len=0, val_fraction=0.3)
    rows = list(read_rows([str(recipe.parent / "chats.jsonl")], rules.form))
    kept = [i for i, row in enumerate(rows) if not is_held_out(row, rules)]
    assert 10 < len(kept) < 40
    line = "chats.jsonl: {weight: 1, as: text, fill: {name: 'Ada \"A\"'}}\n"
    texts, _ = mix(line, "--val_fraction", "0.3")
    assert texts == [{"text": f'Who is {i}?\nI am Ada "A", {i}.\nBye'} for i in kept]
    chats, _ = mix("chats.jsonl: {fill: {name: Ada}}\n", stage="full_sft")
    assert len(chats) == 40 and chats[7]["conversations"][2]["content"] == "I am Ada, 7."


@pytest.mark.parametrize(
    ("lines", "stage", "problem"),
    [
        ("gone.jsonl: 1\n", "pretrain", "gone.jsonl: no such file"),
        ("few.jsonl: 0\n", "pretrain", "the weight of few.jsonl is 0; it must be a number above 0"),
        ("few.jsonl: twice\n", "pretrain", "is 'twice'; it must be a number"),
        ("few.jsonl: {wait: 2}\n", "pretrain", "few.jsonl has wait; there are weight, as and fill"),
        ("chats.jsonl: {as: text}\n", "full_sft", "can be taken as text, by --stage pretrain"),
        ("chats.jsonl: 1\n", "pretrain", "chats.jsonl:1:"),
        ("- few.jsonl\n", "pretrain", "it must have lines of FILE: WEIGHT"),
        ("few.jsonl: [1\n", "pretrain", "expected ',' or ']'"),
    ],
)
def test_what_a_recipe_cannot_say_is_an_error(mix, lines, stage, problem):
    with pytest.raises((ValueError, OSError, yaml.YAMLError)) as found:
        mix(lines, stage=stage)
    assert problem in one_line(found.value)
