"""An answer's calls in, turns of role `tool` out. What is wrong with a call is its result, and the model reads it.

    tools = build_tools(["calculator"])
    tool_turns('Let me see. <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>', tools)
    -> [{"role": "tool", "content": "42"}]
    tool_turns('<tool_call>{"name": "calculater", "arguments": {}}</tool_call>', tools)
    -> [{"role": "tool", "content": "error: found no tool 'calculater', expected one of calculator"}]

A call is written as the chat template writes it: a JSON object with name and arguments between <tool_call> and
</tool_call>, as many of them as are wanted. Calls within <think> are thoughts and are not made.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dataset.chat import JSON, THOUGHT, Message, parse_tool_calls
from evaluation.tools.calculator import calculate
from evaluation.tools.sandbox import Sandbox, ToolError
from evaluation.world import lookup

CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
SHAPE = '{"name": "...", "arguments": {...}}'
MAX_CALLS = 8  # of one answer; further ones get an error
MAX_RESULT = 2000  # characters of a result that a model is given

Arguments = dict[str, JSON]


class Call(NamedTuple):
    name: str
    arguments: Arguments


class MalformedCall(NamedTuple):
    """A call that cannot be read."""

    error: str


class Tool(NamedTuple):
    """What can be called."""

    name: str
    description: str
    parameters: dict[str, JSON]  # JSON schema of the arguments
    run: Callable[[Arguments], str]


def calls_in(answer: str) -> list[Call | MalformedCall]:
    """All calls of an answer, in turn."""
    if thought := THOUGHT.match(answer):
        answer = answer[thought.end() :]
    elif answer.lstrip().startswith("<think>"):  # it never stopped thinking
        return []
    return [call for text, end in CALL.findall(answer) for call in read(text, bool(end))]


def read(text: str, closed: bool) -> list[Call | MalformedCall]:
    """What stands between the tags: one call, or a list of them."""
    if not closed:
        return [MalformedCall("found <tool_call> without </tool_call>")]
    try:
        value = json.loads(text, parse_constant=refuse)
        calls = parse_tool_calls(value, "tool call") if isinstance(value, (dict, list)) else []
    except (ValueError, RecursionError) as error:
        return [MalformedCall(f"found {text.strip()[:80]!r}, expected {SHAPE} ({error})")]
    if not calls:
        return [MalformedCall(f"found {text.strip()[:80]!r}, expected {SHAPE}")]
    return [check(call) for call in calls]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def check(call: dict[str, JSON]) -> Call | MalformedCall:
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return MalformedCall(f"found {json.dumps(call, ensure_ascii=False)[:80]!r}, expected {SHAPE}")
    return Call(name, arguments)


def tool_turns(answer: str, tools: Mapping[str, Tool]) -> list[Message]:
    """Make all calls of an answer: one turn each, in order; none for an answer without calls. Never raises."""
    calls = calls_in(answer)
    results = [run_call(call, tools) for call in calls[:MAX_CALLS]]
    results += [f"error: more than {MAX_CALLS} calls in one answer; this one was not made"] * (len(calls) - MAX_CALLS)
    return [{"role": "tool", "content": result} for result in results]


def run_call(call: Call | MalformedCall, tools: Mapping[str, Tool]) -> str:
    """The result of one call, or "error: " and what was wrong; at most MAX_RESULT characters. Never raises."""
    try:
        text = run(call, tools)
    except (ValueError, ToolError) as error:
        text = f"error: {error}"
    except Exception as error:  # a tool that fails is the model's to see, not the end of a run
        text = f"error: {type(error).__name__}: {error}"
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be tokenized
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]} ... (cut at {MAX_RESULT} characters)"


def run(call: Call | MalformedCall, tools: Mapping[str, Tool]) -> str:
    if isinstance(call, MalformedCall):
        raise ToolError(call.error)
    if (tool := tools.get(call.name)) is None:
        raise ToolError(f"found no tool {call.name[:80]!r}, expected one of {', '.join(tools) or '(none)'}")
    known, needed = tool.parameters.get("properties"), tool.parameters.get("required")
    assert isinstance(known, dict) and isinstance(needed, list), "of a tool that is described"
    more = tool.parameters.get("additionalProperties", False)
    if not set(needed) <= call.arguments.keys() or not (more or call.arguments.keys() <= known.keys()):
        found = ", ".join(call.arguments) or "(none)"
        raise ToolError(f"found the arguments {found[:80]}, expected {', '.join(known) or '(none)'}")
    return tool.run(call.arguments)


# The tools that are here ---------------------------------------------------------------------------------------------


def calculator(arguments: Arguments) -> str:
    expression = arguments["expression"]
    return calculate(expression if isinstance(expression, str) else json.dumps(expression))


def valley(arguments: Arguments) -> str:
    return lookup(str(arguments["animal"]), str(arguments["fact"]))


def texts(**properties: str) -> dict[str, JSON]:
    """The schema of arguments that are texts and all needed: name -> what it is."""
    described: dict[str, JSON] = {key: {"type": "string", "description": value} for key, value in properties.items()}
    return {"type": "object", "properties": described, "required": list(properties)}


CALCULATOR = Tool(
    "calculator",
    "Calculate an arithmetic expression.",
    texts(expression="numbers, + - * / // % ^ ! ( ), sqrt abs round floor ceil min max, pi e"),
    calculator,
)
LOOKUP = Tool(
    "lookup",
    "Look up a fact about an animal of the valley.",
    texts(animal="its name", fact="home, food, friend or weight (its place from the lightest on)"),
    valley,
)
TOOLS = {tool.name: tool for tool in (CALCULATOR, LOOKUP)}


def build_tools(names: Sequence[str]) -> dict[str, Tool]:
    """Name -> tool, of `calculator`, `lookup`, `file.py:function`, and `NAME=` before any of them for another name.

    Raises ValueError for a tool that is not known, two of one name, or a function that cannot be described.
    """
    tools: dict[str, Tool] = {}
    for typed in names:
        alias, _, source = typed.rpartition("=")
        tool = build_tool(source)
        tool = tool._replace(name=alias or tool.name)
        if tool.name in tools:
            raise ValueError(f"found two tools of the name {tool.name}; give one another name: OTHER={source}")
        tools[tool.name] = tool
    return tools


def build_tool(source: str) -> Tool:
    if source in TOOLS:
        return TOOLS[source]
    path, _, function = source.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"found the tool {source!r}, expected one of {', '.join([*TOOLS, 'file.py:function'])}")
    sandbox = Sandbox(path, function)
    try:
        said = sandbox.describe()
    except ToolError as error:
        raise ValueError(f"{path}: {error}") from None
    return Tool(function, said.description, said.parameters, sandbox.call)


def described(tools: Mapping[str, Tool]) -> list[JSON]:
    """The tools as a message's `tools` holds them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in tools.values()
    ]
