"""Rewards by name: what each gives, how several are summed, and what is said of one that gives no number."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset import CONVERSATION, PROMPT
from dataset.chat import message_fragments, parse_tool_calls
from dataset.records import read_rows
from dataset.sample.make_sample import WARM, open_prompts, true_sentences
from evaluation import Reward, Sample
from evaluation.rewards import RewardError
from evaluation.tools import Call, build_tools, calls_in, tool_turns
from evaluation.world import lookup
from tests.helpers import ROOT, write_jsonl

QUESTION = [{"role": "user", "content": "What is 6 x 7?"}]


def value(name: str, answer: str, /, finish_reason: str = "stop", messages: Any = QUESTION, **row: Any) -> float:
    (total,) = Reward([name])([Sample(messages, answer, row, finish_reason, "rows.jsonl:7")]).total
    return total


# What each gives ------------------------------------------------------------------------------------------------------


def test_exact_match_is_of_the_answer_without_its_reasoning() -> None:
    assert value("exact_match", "<think>6 x 7</think> 42\n", answer=["42"]) == 1
    assert value("exact_match", "42", answer=["41", "<think>why</think>42"]) == 1
    assert value("exact_match", "42", answer=[42]) == 1
    assert value("exact_match", "It is 42", answer=["42"]) == 0
    assert value("exact_match", "42", "length", answer=["42"]) == 0  # it did not end


def test_overlap_is_of_words_and_of_neighbours() -> None:
    assert value("overlap", "The cat SAT.", answer=["the cat sat"]) == 1
    assert value("overlap", "the cat ran", answer=["a dog", "the cat sat"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert value("overlap", "sat cat the", answer=["the cat sat"]) == 0.5  # the words, and none in their order
    assert value("overlap", "the the the the", answer=["the cat"]) == pytest.approx((2 / 6 + 0) / 2)  # counted once
    assert value("overlap", "巴黎是首都", answer=["巴黎"]) == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert value("overlap", "<think>yes</think>No", answer=["yes"]) == 0
    assert value("overlap", "", answer=["yes"]) == 0
    assert value("overlap", "42", answer=[42]) == 1


@pytest.mark.parametrize(
    ("answer", "finish", "row", "reward"),
    [
        ("It is 42, a number.", "stop", {}, 1),
        ("It is 42, a number.", "length", {}, 0),
        ("... !", "stop", {}, 0),  # says nothing
        ("no " * 12, "stop", {}, 0),
        ("这个数字是四十二", "stop", {}, 0),  # the question is English
        ("这个数字是四十二", "stop", {"answer": ["四十二"]}, 1),  # which wanted a translation
        ("forty-two", "stop", {"answer": ["无"]}, 1),  # data has such words where no answer is known
        ("猫很可爱，" * 6, "stop", {"answer": ["猫"]}, 0),
    ],
)
def test_whole_is_what_ends_and_says_something_in_the_right_script(
    answer: str, finish: str, row: dict[str, Any], reward: float
) -> None:
    assert value("whole", answer, finish, **row) == reward


@pytest.mark.parametrize(
    ("answer", "expected", "reward"),
    [
        ("6 x 7 is 42.", "42", 1),
        ("it makes $1,234.50", 1234.5, 1),
        ("0.5", "1/2", 1),
        ("共４２只", "he had 6, so #### 42", 1),
        ("42 or 43", "42", 0),
        ("<think>42</think>I do not know", "42", 0),
        ("-42", "42", 0),
        ("", "42", 0),
    ],
)
def test_number_is_the_last_one(answer: str, expected: object, reward: float) -> None:
    assert value("number", answer, answer=[expected]) == reward


def test_contains_is_the_share_of_what_the_final_answer_must_hold() -> None:
    assert value("contains", "It is 42.0, in Oslo (晴天).", answer=["42", "oslo", "晴", "Rome"]) == 0.75
    assert value("contains", "142 categories in Osloer Straße", answer=["42", "cat", "oslo", "STRASSE"]) == 0.25
    assert value("contains", "<think>42</think>So.", answer=["42"]) == 0
    assert value("contains", "１，２００ km", answer=["1,200", 1200]) == 1


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("42", 1),
        ("<think>6 x 7</think>42", 1),
        ("<think>6 x 7</think>" + CALL + CALL, 1),
        ("Let me see. " + CALL, 1),
        ("", 0),
        ("<think>6 x 7</think> ", 0),
        ("<think>6 x 7", 0),
        ("6 x 7</think>42", 0),
        ("42<think>6 x 7</think>", 0),
        ("<think>a</think><think>b</think>42", 0),
        ("<think>a<think>b</think>42", 0),
        (CALL.removesuffix("</tool_call>"), 0),
        (CALL + "</tool_call>", 0),
        ('<tool_call>{"name": "f", }</tool_call>', 0),
        ('<tool_call>{"arguments": {}}</tool_call>', 0),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', 0),
        ("42<|user|>And 7 x 8?", 0),
    ],
)
def test_format_is_what_the_chat_template_can_say_again(answer: str, reward: float) -> None:
    assert value("format", answer) == reward
    assert value("format:think", answer) == (reward if answer.startswith("<think>") else 0)


def test_rubbish_of_a_collapsed_model_is_judged_as_any_answer() -> None:
    for answer in ("<tool_call>" * 4096, "<think>" * 4096, "<tool_call>" + "[" * 100_000 + "</tool_call>", "1/" * 9000):
        for name in ("exact_match", "number", "contains"):
            assert value(name, answer, answer=["42"]) == 0
        assert value("format", answer) == float(answer.startswith("1"))


def test_length_falls_from_what_it_is_told() -> None:
    found = [value("length:10", "x" * count) for count in (0, 10, 15, 20, 100)]
    assert found == [1, 1, 0.5, 0, 0]
    assert [value("length:4-10", "x" * count) for count in (0, 1, 4, 10, 15)] == [0, 0.25, 1, 1, 0.5]


def test_world_wants_true_sentences_a_warm_closing_and_an_end() -> None:
    for prompt in open_prompts()[:8]:
        asked = [{"role": "user", "content": prompt.question}]
        space = " " if prompt.language == "en" else ""
        warm = [closing.to(prompt.language) for closing in WARM]
        other = next(p for p in open_prompts() if p.language == prompt.language and p.animal != prompt.animal)
        facts = sorted(true_sentences(prompt) - true_sentences(other))[:2]

        def judged(*sentences: str, finish_reason: str = "stop", asked: Any = asked, space: str = space) -> float:
            return value("world", space.join(sentences), finish_reason, messages=asked)

        assert judged(*facts, warm[0]) == 1
        assert judged(*facts, warm[0], finish_reason="length") == 0
        assert judged(*facts) == 0 and judged(facts[0], warm[0]) == 0 and judged(warm[0]) == 0
        assert judged(facts[0], facts[0], warm[0]) == 0 and judged(warm[0], *facts) == 0
        assert judged(*facts, warm[1], warm[0]) == 0  # one closing
        assert (
            value("world", space.join([*facts, warm[0]]), messages=[{"role": "user", "content": other.question}]) == 0
        )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_world_agrees_with_the_samples_own_pairs(side: str) -> None:
    lines = (ROOT / "dataset/sample/dpo_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)[side] for line in lines]
    found = Reward(["world"])([Sample(messages[:-1], messages[-1]["content"], {}) for messages in rows])
    assert found.total == [float(side == "chosen")] * 256


def test_the_lookup_knows_what_sft_teaches() -> None:
    for line in (ROOT / "dataset/sample/sft.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = (message["content"] for message in json.loads(line)["conversations"][-2:])
        if question.startswith("What does the ") and question.endswith(" eat?") and answer.startswith("The "):
            animal = question.removeprefix("What does the ").removesuffix(" eat?")
            assert lookup(animal, "food") in answer
    assert lookup("Mouse ", "weight") == "1 of 14" and lookup("龙", "weight") == "14 of 14"


# Several, and errors --------------------------------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import sys

@dataclass
class Wanted:
    word: str

WANTED = Wanted("please")
RUNS = 0

def polite(messages, answer, row):
    return WANTED.word in answer

def per_row(messages, answer, row):
    return len(messages) * row["scale"] + (row["finish_reason"] == "stop")

def nothing(messages, answer, row): pass
def text(messages, answer, row): return "1.0"
def infinite(messages, answer, row): return float("inf")
def huge(messages, answer, row): return 10 ** 400
def broken(messages, answer, row): return 1 / len(row["missing"])
def leaves(messages, answer, row): sys.exit(0)
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return str(path)


def test_several_are_weighted_and_their_parts_are_told(own: str) -> None:
    reward = Reward(["number", f"{own}:polite", f"{own}:per_row", "length:4"], [1, 0.5, 0.25, -1])
    samples = [
        Sample(QUESTION, "42, please", {"answer": [42], "scale": 2}),
        Sample(QUESTION, "41", {"answer": [42], "scale": 4}, "length"),
    ]
    scores = reward(samples)
    assert scores.parts == {"number": [1, 0], "polite": [1, 0], "per_row": [3, 4], "length": [0, 1]}
    assert scores.total == [1 + 0.5 + 0.75, 0 + 0 + 1 - 1]
    assert "finish_reason" not in samples[0].row
    assert reward([]) == ([], {part: [] for part in scores.parts})


def test_a_judge_is_asked_for_all_answers_at_once(own: str) -> None:
    asked = []

    def load(option: str):
        def judge(samples: Sequence[Sample]) -> list[Any]:
            asked.append((option, len(samples)))
            return [np.float32(len(sample.answer)) for sample in samples]

        return judge

    judges = {"reward_model": load}
    reward = Reward(["reward_model:out/reward_128", "reward_model:b", f"{own}:polite"], [1, 2, 1], judges)
    scores = reward([Sample(QUESTION, "abc", {}), Sample(QUESTION, "a", {})])
    assert scores.total == [9, 3] and asked == [("out/reward_128", 2), ("b", 2)]
    assert list(scores.parts) == ["reward_model:out/reward_128", "reward_model:b", "polite"]
    few = Reward(["few"], judges={"few": lambda option: lambda samples: [1.0]})
    with pytest.raises(RewardError, match="reward few: found 1 values for 2 answers"):
        few([Sample(QUESTION, "a", {})] * 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "found None (NoneType), expected a finite number"),
        ("text", "found '1.0' (str), expected a finite number"),
        ("infinite", "found inf, expected a finite number"),
        ("huge", "found 1000000000"),
        ("broken", "KeyError: 'missing' (own.py:"),
        ("leaves", "SystemExit: 0 (own.py:"),
    ],
)
def test_a_reward_that_gives_no_number_is_named_with_its_row(own: str, function: str, message: str) -> None:
    with pytest.raises(RewardError) as error:
        value(f"{own}:{function}", "42")
    assert str(error.value).startswith(f"rows.jsonl:7: reward {own}:{function}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("exact_match", {}, 'found no "answer" and no "gt" in the row'),
        ("number", {"answer": ["many"]}, "found no number in the row's answer 'many'"),
        ("world", {}, "found the prompt 'What is 6 x 7?', expected one like 'Tell me about the red horse.'"),
    ],
)
def test_a_row_that_a_reward_cannot_judge_is_named(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError) as error:
        value(name, "42", **row)
    assert str(error.value).startswith(f"rows.jsonl:7: reward {name}: {message}")


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], None, "found 0 rewards"),
        (["number"], [1, 2], "found 1 rewards and 2 weights"),
        (["number"], [float("nan")], "found the weight nan"),
        (["number", "number"], None, "found the reward number twice"),
        (["numbr"], None, "found the reward 'numbr', expected one of exact_match, number, contains,"),
        (["reward_model:x"], None, "found the reward 'reward_model:x'"),
        (["number:3"], None, "found the option '3' of the reward number, which takes none"),
        (["length"], None, "expected characters: length:200 or length:50-200"),
        (["length:9-3"], None, "found the option '9-3'"),
        (["format:tools"], None, "expected think or none"),
        (["OWN"], None, "expected file.py:function"),
        (["OWN:polit"], None, "own.py: found no function polit, expected one of dataclass, polite, per_row"),
        (["none.py:f"], None, "none.py: no such file"),
    ],
)
def test_a_wrong_name_or_weight_is_told_at_once(own: str, names: list[str], weights: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Reward([name.replace("OWN", own) for name in names], weights)
    assert message in str(error.value)


# Whole rows -----------------------------------------------------------------------------------------------------------


def test_a_row_with_tools_goes_from_its_file_to_its_reward(tmp_path: Path) -> None:
    """As MiniMind's agent rows are: tools in the system turn, `gt` for what the final answer must hold."""
    row = {
        "conversations": [
            {"role": "system", "content": "", "tools": '[{"name": "calculate_math"}]'},
            {"role": "user", "content": "6 x 7, and its half?"},
            {"role": "assistant", "content": ""},
        ],
        "gt": ["42", "21"],
    }
    (read,) = read_rows([str(write_jsonl(tmp_path / "agent.jsonl", [row]))], PROMPT)
    calls = "".join(
        f'<tool_call>{{"name": "calculate_math", "arguments": {{"expression": "{text}"}}}}</tool_call>'
        for text in ("6×7", "6*7/2")
    )
    turns = tool_turns(calls, build_tools(["calculate_math=calculator"]))
    said = " and ".join(str(turn["content"]) for turn in turns)
    messages = [*read.value["conversations"], {"role": "assistant", "content": calls}, *turns]
    samples = [Sample(messages, answer, read.value, where=read.where) for answer in (said, "42", calls)]
    assert Reward(["contains"])(samples).total == [1, 0.5, 0]


def test_answers_of_real_data_are_their_own_references(data_dir: Path) -> None:
    """GSM8K's answers end in `#### number`."""
    rows = list(islice(read_rows([str(data_dir / "sft" / "en_gsm8k_train.jsonl")], PROMPT), 300))
    answers = [row.value["answer"][0] for row in rows]
    assert all("####" in answer for answer in answers)
    reward = Reward(["number", "exact_match", "format"])

    def judged(answers: list[str]) -> dict[str, list[float]]:
        return reward([Sample([], answer, row.value) for answer, row in zip(answers, rows, strict=True)]).parts

    assert judged(answers) == dict.fromkeys(("number", "exact_match", "format"), [1.0] * len(rows))
    others = judged(answers[1:] + answers[:1])
    assert sum(others["number"]) < 0.1 * len(rows) and sum(others["exact_match"]) == 0
    last = [f"That makes {answer.rpartition('####')[2].strip()} in all." for answer in answers]
    assert judged(last)["number"] == [1.0] * len(rows)


@pytest.mark.parametrize("name", ["en_glaive_toolcall", "zh_glaive_toolcall", "en_reason_tool", "en_bfcl_toolcall"])
def test_calls_of_real_data_are_well_formed_and_read_back(data_dir: Path, name: str) -> None:
    found, judged = 0, []
    for row in islice(read_rows([str(data_dir / "sft" / f"{name}.jsonl")], CONVERSATION), 200):
        for message in row.value["conversations"]:
            if message["role"] != "assistant":
                continue
            answer = "".join(fragment.text for fragment in message_fragments(message)[1:-1])
            calls = parse_tool_calls(message.get("tool_calls"))
            assert calls_in(answer) == [Call(str(call["name"]), call.get("arguments") or {}) for call in calls], (
                row.where
            )
            found += len(calls)
            if answer.strip():
                judged.append(value("format", answer))
    assert found > 20 and sum(judged) >= 0.97 * len(judged)  # a few of these rows have loose tags in their texts
