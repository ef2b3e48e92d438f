"""Calls as a model writes them, and what it reads of them."""

import json
from pathlib import Path

import pytest

from dataset import DEFAULT_TOKENIZER, load_tokenizer, parse_answer, render_chat
from evaluation.tools import Call, MalformedCall, build_tools, calls_in, described, tool_turns
from evaluation.tools.calls import MAX_CALLS, MAX_RESULT

TOOLS = build_tools(["calculator", "calculate_math=calculator", "lookup"])


def written(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def results(answer: str) -> list[str | None]:
    turns = tool_turns(answer, TOOLS)
    assert all(turn.keys() == {"role", "content"} and turn["role"] == "tool" for turn in turns)
    return [turn["content"] for turn in turns]


def test_every_call_of_an_answer_is_made_in_order() -> None:
    answer = (
        "<think>I need " + written("calculator", expression="1") + "</think>Let me see."
        f"{written('calculator', expression='6*7')} and {written('calculate_math', expression='（１＋２）×3')}"
        f"{written('lookup', animal='horse', fact='home')}{written('lookup', animal='马', fact='home')}"
    )
    assert results(answer) == ["42", "9", "in the village", "村里"]
    assert results("no call") == [] and results("<think>" + written("calculator", expression="1")) == []


def test_the_forms_that_others_write_are_read() -> None:
    function = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2"}'}}
    several = [{"name": "calculator", "arguments": {"expression": 3}}] * 2
    answer = f"<tool_call>\n{json.dumps(function)}\n</tool_call><tool_call>{json.dumps(several)}</tool_call>"
    assert results(answer) == ["2", "3", "3"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('<tool_call>{"name": "calculator"', "without </tool_call>"),
        ("<tool_call>calculator(1)</tool_call>", "expected {"),
        ("<tool_call></tool_call>", "expected {"),
        ("<tool_call>[]</tool_call>", "expected {"),
        ("<tool_call>null</tool_call>", "expected {"),
        ('<tool_call>{"arguments": {}}</tool_call>', "expected {"),
        ('<tool_call>{"name": ["calculator"]}</tool_call>', "expected {"),
        ('<tool_call>{"name": "calculator", "arguments": [1]}</tool_call>', "expected {"),
        ('<tool_call>{"name": "calculator", "arguments": "1+"}</tool_call>', "expected JSON"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": NaN}}</tool_call>', "NaN is no JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "expected {"),
        ('<tool_call>{"name": "x", "arguments": ' + "9" * 5000 + "}</tool_call>", "expected {"),
        (written("calculater", expression="1"), "found no tool 'calculater', expected one of calculator,"),
        (written("calculator"), "found the arguments (none), expected expression"),
        (written("calculator", expression="1", digits=3), "found the arguments expression, digits"),
        (written("calculator", expression="9**9**9"), "more than 300 digits"),
        (written("calculator", expression={"a": 1}), "found '{'"),
        (written("lookup", animal="whale", fact="home"), "found the animal 'whale', expected one of mouse, 鼠"),
        (written("lookup", animal="horse", fact="age"), "found the fact 'age', expected one of home, food"),
    ],
)
def test_a_bad_call_is_answered_with_what_was_wrong(answer: str, message: str) -> None:
    (result,) = results("Let me see. " + answer)
    assert result is not None and result.startswith("error: ") and message in result and len(result) < 400


def test_calls_and_results_are_bounded() -> None:
    found = results(written("calculator", expression="1") * (MAX_CALLS + 2))
    assert found[:MAX_CALLS] == ["1"] * MAX_CALLS and len(found) == MAX_CALLS + 2
    assert all(each is not None and "this one was not made" in each for each in found[MAX_CALLS:])
    tool = TOOLS["calculator"]._replace(name="long", run=lambda arguments: "\ud800" + "x" * 10_000)
    (turn,) = tool_turns(written("long", expression="1"), {"long": tool})
    assert turn["content"] == "?" + "x" * (MAX_RESULT - 1) + f" ... (cut at {MAX_RESULT} characters)"

    def fail(arguments: object) -> str:
        raise RecursionError("deep")

    (turn,) = tool_turns(written("long", expression="1"), {"long": tool._replace(run=fail)})
    assert turn["content"] == "error: RecursionError: deep"


def test_a_call_survives_the_chat_template_there_and_back() -> None:
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    answer = (
        "<think>hm</think>Well." + written("calculator", expression='"</tool_call>') + written("lookup", animal="马")
    )
    plain = answer.replace('\\"</tool_call>', "1")
    assert calls_in(plain) == [Call("calculator", {"expression": "1"}), Call("lookup", {"animal": "马"})]
    messages = [{"role": "system", "content": "", "tools": described(TOOLS)}, {"role": "user", "content": "Go"}]
    said = render_chat(tokenizer, [*messages, parse_answer(plain), *tool_turns(plain, TOOLS)])
    prompt = render_chat(tokenizer, messages, add_generation_prompt=True).ids
    supervised = [i for i, kept in zip(said.ids, said.mask, strict=True) if kept]
    assert said.ids[: len(prompt)] == prompt
    assert tokenizer.decode(supervised, skip_control=False).removesuffix("<|end|>") == plain
    assert calls_in(tokenizer.decode(supervised, skip_control=False).removesuffix("<|end|>")) == calls_in(plain)
    assert isinstance(calls_in(answer)[0], MalformedCall)  # a tag within an argument ends the call


def test_a_tool_that_is_not_there_is_named(tmp_path: Path) -> None:
    for names, message in (
        (["calculater"], "found the tool 'calculater', expected one of calculator, lookup, file.py:function"),
        (["calculator", "calculator"], "give one another name: OTHER=calculator"),
        ([f"{tmp_path}/none.py:f"], "none.py: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tools(names)
