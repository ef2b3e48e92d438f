"""The sample data: the same bytes on every run, and nothing trained on what it is scored on."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from dataset.encode import Encoder, Report, Rules

SAMPLE = Path(__file__).parent.parent.parent / "dataset" / "sample"
TRAINING = ("pretrain.jsonl", "sft.jsonl", "dpo.jsonl")
STAGE = {
    "pretrain.jsonl": "pretrain", "pretrain_heldout.jsonl": "pretrain", "sft.jsonl": "full_sft",
    "questions.jsonl": "full_sft", "dpo.jsonl": "dpo", "dpo_heldout.jsonl": "dpo",
}  # fmt: skip


def load_script():
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_sample = load_script()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def texts(row: dict) -> Iterator[str]:
    """Every text in a row of any form."""
    if "text" in row:
        yield row["text"]
    for key in ("conversations", "chosen", "rejected"):
        yield from (message["content"] for message in row.get(key, ()))


def all_training_text() -> str:
    return "\n".join(text for name in TRAINING for row in rows(name) for text in texts(row))


def kept_out_strings() -> dict[str, list[str]]:
    """Family -> how its kept-out combinations would be written, in both languages."""
    m = make_sample

    def pairs(table, other, kept_out):
        return [(table[i], other[j]) for i, j in m.pairs(len(table), len(other), kept_out, True)]

    colours = pairs(m.COLOURS, m.ANIMALS, m.kept_out_colour)
    kinds = [(side, a) for both, a in pairs(m.KINDS, m.ANIMALS, m.kept_out_kind) for side in both]
    weights = [(a, b) for a, b in pairs(m.ANIMALS, m.ANIMALS, m.kept_out_weights) if a != b]
    following = [(a, b) for a, b in pairs(m.THINGS, m.THINGS, m.kept_out_next) if a != b]
    owners = pairs(m.PEOPLE, m.THINGS, m.kept_out_owner)
    found = {
        "colour": [s for c, a in colours for s in (f"{c.en} {a.en}", f"{c.en} {a.plural}", f"{c.zh}{a.zh}")],
        "kind": [s for k, a in kinds for s in (f"{k.en} {a.en}", f"{k.zh}的{a.zh}")],
        "weights": [
            s
            for a, b in weights
            for s in (
                f"the {a.en} or the {b.en}",
                f"er than the {b.en}. The {a.en}" if False else f"{a.zh}和{b.zh}，哪个",
                f"{a.zh}比{b.zh}",
            )
        ],
        "owner": [s for p, t in owners for s in (f"{t.en} is {p.en}", f"{t.zh}是{p.zh}")],
        "next": [s for a, b in following for s in (f"{a.en}, {b.en}", f"{a.zh}、{b.zh}")],
    }
    return found
