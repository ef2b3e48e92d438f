"""The sample data: the same bytes on every run, and nothing in it is trained on what it is scored on.

What a row says is found again by reading its text ("three red horses" -> the pair (red, horse)), not by asking the
script.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from dataset.columns import Report
from dataset.encode import Rules, encode_row
from dataset.records import read_rows
from tests.helpers import FORM_OF

SAMPLE = Path(__file__).parent.parent.parent / "dataset" / "sample"
STAGES = {
    "pretrain.jsonl": "pretrain", "pretrain_heldout.jsonl": "pretrain", "sft.jsonl": "full_sft",
    "questions.jsonl": "full_sft", "dpo.jsonl": "dpo", "dpo_heldout.jsonl": "dpo",
    "reward.jsonl": "dpo", "reward_heldout.jsonl": "dpo", "grpo.jsonl": "grpo", "grpo_heldout.jsonl": "grpo",
}  # fmt: skip
TRAINING = ("pretrain.jsonl", "sft.jsonl", "dpo.jsonl", "reward.jsonl", "grpo.jsonl")
MAX_SEQ_LEN = 256  # of configs/quickstart_*.yaml
Combinations = set[tuple[int, ...]]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = load_script()


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def texts(row: dict) -> Iterator[str]:
    """Every text in a row of any form."""
    if "text" in row:
        yield row["text"]
    for key in ("conversations", "chosen", "rejected"):
        yield from (message["content"] for message in row.get(key, ()))


def text_of(*names: str) -> str:
    return "\n".join(text for name in names for row in read(name) for text in texts(row))


# Reading combinations ---------------------------------------------------------------------------------------------


def indices(table: tuple, language: str) -> dict[str, int]:
    """Word -> its place in a table; plurals are words of their own."""
    found = {getattr(word, language): i for i, word in enumerate(table)}
    if language == "en":
        found |= {word.plural: i for i, word in enumerate(table) if hasattr(word, "plural")}
    return found


KINDS = {  # the place of the pair of opposites that an adjective belongs to
    language: {getattr(word, language): i for i, both in enumerate(sample.KINDS) for word in both}
    for language in ("en", "zh")
}


def find(text: str, pattern: str, first: dict[str, int], second: dict[str, int]) -> Combinations:
    """FIRST and SECOND in the pattern stand for any word of the two tables."""
    for name, table in (("FIRST", first), ("SECOND", second)):
        words = "|".join(sorted(table, key=len, reverse=True))
        pattern = pattern.replace(name, f"({words})")
    return {(first[a], second[b]) for a, b in re.findall(pattern, text)}


def combinations_in(text: str) -> dict[str, Combinations]:
    """What is combined -> the combinations in the text, in either language."""
    animals_en, animals_zh = indices(sample.ANIMALS, "en"), indices(sample.ANIMALS, "zh")
    colours = find(text, r"\bFIRST SECOND\b", indices(sample.COLOURS, "en"), animals_en)
    colours |= find(text, r"FIRSTSECOND", indices(sample.COLOURS, "zh"), animals_zh)
    kinds = find(text, r"\bFIRST SECOND\b", KINDS["en"], animals_en)
    kinds |= find(text, r"FIRST的SECOND", KINDS["zh"], animals_zh)
    weights = find(text, r"the FIRST or the SECOND\?", animals_en, animals_en)
    weights |= find(text, r"[Tt]he FIRST is (?:heavi|light)er than the SECOND", animals_en, animals_en)
    weights |= find(text, r"FIRST[和比]SECOND", animals_zh, animals_zh)
    return {"colour": colours, "kind": kinds, "weights": weights}


KEPT_OUT = {
    "colour": sample.kept_out_colour,
    "kind": sample.kept_out_kind,
    "weights": sample.kept_out_weights,
}
# which combination a family of questions keeps out
FAMILY = {"translate": "colour", "ask": "colour", "opposite": "kind", "compare": "weights"}


# Tests ------------------------------------------------------------------------------------------------------------


def test_the_script_writes_the_committed_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLE / "make_sample.py"), "--out_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    for name in STAGES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_reading_finds_combinations() -> None:
    found = combinations_in("Look: two gold hens by the river. The old hen is sad.")
    assert found == {
        "colour": {(5, 4)},
        "kind": {(5, 4)},
        "weights": set(),
    }
    assert combinations_in("鼠和马，哪个更重？河边的两只金鸡")["weights"] == {(0, 10)}


def test_no_kept_out_combination_is_trained_on() -> None:
    for name in TRAINING:
        for family, found in combinations_in(text_of(name)).items():
            assert found or name in ("dpo.jsonl", "grpo.jsonl"), f"{name}: nothing of {family} was found"
            assert not [combination for combination in found if KEPT_OUT[family](*combination)], f"{name}: {family}"


def test_every_word_of_a_kept_out_combination_is_trained_on_in_others() -> None:
    asked = combinations_in(text_of("questions.jsonl"))
    trained = combinations_in(text_of("pretrain.jsonl", "sft.jsonl"))
    for family, kept_out in KEPT_OUT.items():
        used = {word for found in asked[family] if kept_out(*found) for word in enumerate(found)}
        assert used and used <= {word for found in trained[family] for word in enumerate(found)}, family


@pytest.mark.parametrize("family", FAMILY)
def test_every_question_needs_one_kept_out_combination(family: str) -> None:
    rows = read("questions.jsonl")
    size = len(rows) // len(FAMILY)
    start = list(FAMILY).index(family) * size
    for row in rows[start : start + size]:
        question, answer = (message["content"] for message in row["conversations"])
        found = combinations_in(question)[FAMILY[family]]
        assert sum(KEPT_OUT[FAMILY[family]](*combination) for combination in found) == 1, (question, answer)


def test_held_out_rows_are_not_training_rows() -> None:
    trained = text_of(*TRAINING)
    for row in read("questions.jsonl"):
        assert row["conversations"][0]["content"] not in trained
    documents = {row["text"] for row in read("pretrain.jsonl")}
    assert not documents & {row["text"] for row in read("pretrain_heldout.jsonl")}
    for row in read("dpo_heldout.jsonl"):
        (pair,) = combinations_in(row["chosen"][0]["content"])["colour"]
        assert sample.kept_out_colour(*pair) and row["chosen"][0]["content"] not in trained
    asked = [row["conversations"][0]["content"] for row in read("grpo_heldout.jsonl")]
    assert asked == [prompt.question for prompt in sample.open_prompts()] and not any(each in trained for each in asked)


def test_comparisons_follow_the_order_of_weights() -> None:
    for row in read("questions.jsonl") + read("sft.jsonl"):
        for question, answer in zip(row["conversations"], row["conversations"][1:], strict=False):
            if match := re.fullmatch(r"Which is (\w+), the (\w+) or the (\w+)\?", question["content"]):
                known = indices(sample.ANIMALS, "en")
                pick = max if match[1] == "heavier" else min
                assert answer["content"] == f"The {pick(match[2], match[3], key=known.get)} is {match[1]}."


@pytest.mark.parametrize("name", ["dpo.jsonl", "dpo_heldout.jsonl"])
def test_length_does_not_tell_chosen_from_rejected(name: str) -> None:
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    chosen, rejected = (
        [len(tokenizer.encode(row[side][-1]["content"])) for row in read(name)] for side in ("chosen", "rejected")
    )
    longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    shorter = sum(a < b for a, b in zip(chosen, rejected, strict=True))
    assert 0.45 < longer / (longer + shorter) < 0.55
    assert sum(chosen) == pytest.approx(sum(rejected), rel=0.02)


def test_both_manners_are_equally_frequent_before_dpo() -> None:
    answers = [message["content"] for row in read("sft.jsonl") for message in row["conversations"][1:]]
    for language in ("en", "zh"):
        warm, curt = (
            sum(answer.endswith(tuple(getattr(closing, language) for closing in closings)) for answer in answers)
            for closings in (sample.WARM, sample.CURT)
        )
        assert warm == curt > 100


@pytest.mark.parametrize("name", STAGES)
def test_every_row_is_used_whole(name: str) -> None:
    rules = Rules(FORM_OF[STAGES[name]], MAX_SEQ_LEN)
    tokenizer, report = load_tokenizer(DEFAULT_TOKENIZER), Report()
    for row in read_rows([str(SAMPLE / name)], rules.form):
        encode_row(row, tokenizer, rules, report)
    assert report.used == len(read(name)) and not report.cut


def test_the_files_are_small() -> None:
    assert sum((SAMPLE / name).stat().st_size for name in STAGES) < 3_000_000


def test_the_valley_knows_its_facts_and_tells_a_wrong_one() -> None:
    """The generator's own rows, and the same spoilt in one place."""
    prompts = sample.open_prompts()
    assert len({prompt.question for prompt in prompts}) == 64
    judged = 0
    for row in read("dpo_heldout.jsonl"):
        asked = row["chosen"][0]["content"]
        right = next(p for p in prompts if sample.named(p.colour, p.animal).to(p.language) in asked)
        wrong = next(p for p in prompts if p.language == right.language and p.animal != right.animal)
        for side in ("chosen", "rejected"):
            answer = row[side][1]["content"]
            assert sample.facts_right(right, answer) and not sample.facts_right(wrong, answer)
            assert not sample.facts_right(right, answer + answer)  # said twice
            assert not sample.facts_right(right, answer[:-2])  # not ended
            judged += 1
    assert judged == 512 and not sample.facts_right(prompts[0], "")


def test_a_pair_for_a_reward_model_is_spoilt_in_the_way_it_says() -> None:
    """Read from the text: what a kind of pair must have, and must not have, in common."""
    told = {"closing": True, "fact": False, "subject": False, "repeated": False, "broken": False, "cut": False}
    counts = dict.fromkeys([*told, "answer"], 0)
    prompts = {p.question: p for held_out in (False, True) for p in every_prompt(held_out)}
    for row in read("reward.jsonl") + read("reward_heldout.jsonl"):
        kind, (asked, chosen), (_, rejected) = row["kind"], row["chosen"], row["rejected"]
        counts[kind] += 1
        right, wrong = chosen["content"], rejected["content"]
        assert right != wrong
        if kind == "answer":
            continue
        prompt = prompts[asked["content"]]
        assert sample.facts_right(prompt, right), row
        assert sample.facts_right(prompt, wrong) == told[kind], row
        lines, spoilt = split(right), split(wrong)
        if kind in ("closing", "fact", "repeated", "broken"):
            differ = [i for i, pair in enumerate(zip(lines, spoilt, strict=True)) if pair[0] != pair[1]]
            assert len(differ) == 1 and (differ == [3]) == (kind == "closing"), row
        if kind == "repeated":
            assert len(set(spoilt)) == 3
        if kind == "broken":
            place = differ[0]
            assert sorted(lines[place].replace(" ", "")) == sorted(spoilt[place].replace(" ", ""))
        if kind == "cut":
            assert right.startswith(wrong) and not wrong.endswith((".", "!", "\u3002", "\uff01"))
        if kind == "subject":  # true of another
            assert any(sample.facts_right(p, wrong) for p in prompts.values() if p.animal != prompt.animal)
    assert counts == dict.fromkeys(told, 220) | {"answer": 440}


def every_prompt(held_out: bool) -> list:
    """Every way of asking, not only those of the open prompts that are answered in reports."""
    return [
        sample.OpenPrompt(p.language, p.colour, p.animal, form.format(sample.named(p.colour, p.animal).to(p.language)))
        for p in sample.open_prompts(held_out)
        for form in sample.DESCRIBE[p.language]
    ]


def split(answer: str) -> list[str]:
    return [each for each in re.split(r"(?<=[.!\u3002\uff01])\s*", answer) if each]


def test_a_wrong_answer_to_a_question_is_another_one_of_its_kind() -> None:
    """Checked by translating back, by the order of weights, and by both adjectives being turned."""
    tables = (*sample.KINDS, *sample.STATES)
    kinds = {word.en: other.en for both in tables for word, other in (both, both[::-1])}
    asked = {"opposite": 0, "compare": 0}
    for row in read("reward_heldout.jsonl"):
        question, right, wrong = (m["content"] for m in (*row["chosen"], row["rejected"][1]))
        if row["kind"] == "answer" and question.startswith("Say the opposite: "):
            said = question.removeprefix("Say the opposite: ")
            turned = " ".join(kinds.get(word.rstrip("."), word.rstrip(".")) for word in said.split(" ")) + "."
            assert right == turned and wrong not in (turned, said)
            asked["opposite"] += 1
        if row["kind"] == "answer" and (match := re.fullmatch(r"Which is (\w+), the (\w+) or the (\w+)\?", question)):
            known = indices(sample.ANIMALS, "en")
            pick, other = (max, min) if match[1] == "heavier" else (min, max)
            assert right == f"The {pick(match[2], match[3], key=known.get)} is {match[1]}."
            assert wrong == f"The {other(match[2], match[3], key=known.get)} is {match[1]}."
            asked["compare"] += 1
    assert min(asked.values()) > 5, asked
