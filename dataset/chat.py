"""Messages -> token ids and loss mask, and an answer's text -> message again. The one renderer: training and chat both
come through here.

    [{"role": "user", "content": "我们"}, {"role": "assistant", "content": "世界"}]

    fragments   <s>  <|user|>  我们  <|end|>  <|assistant|>  世界  <|end|>
    ids           1         5 529        8              6 2070        8
    mask          0         0    0        0              0    1        1      (1 = supervised)

The mask follows from how the text was built: each fragment knows whether the assistant wrote it. Nothing is
searched for afterwards, and the text of a message can never become a control token, so a user who writes
"<|assistant|>" supervises nothing.

    parse_answer("<think>2+3</think>5") -> {"role": "assistant", "content": "5", "reasoning_content": "2+3"}

`dataset/tokenizer_6400/chat_template.jinja` says the same for Hugging Face; a test holds the two together.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict, cast

from dataset.tokenizer import HFTokenizer, TextTokenizer, Tokenizer

ROLES = ("system", "user", "assistant", "tool")

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]


class Message(TypedDict, total=False):
    """One turn of a conversation: role and content, and what else there is to it."""

    role: str  # one of ROLES
    content: str | None  # may be None or left out beside one of the following
    reasoning_content: str | None  # of an assistant: what it thinks before it answers
    tool_calls: JSON  # of an assistant: a list, or its JSON text; `parse_tool_calls` reads every form
    tools: JSON  # of anyone else: those that may be called, a list, or its JSON text


class Rendered(NamedTuple):
    """Token ids of a conversation and, for each, whether it is supervised."""

    ids: list[int]
    mask: list[bool]


class Fragment(NamedTuple):
    """A bit of a conversation: plain text, or the name of one control token."""

    text: str
    control: bool
    supervised: bool


def render_chat(tokenizer: TextTokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
    """Ids and mask of a conversation; with `add_generation_prompt` it ends where the assistant is to speak.

    Supervised: everything an assistant says, after <|assistant|> and up to its <|end|>, that one included.
    Up to any assistant turn the ids are those of the shorter conversation with a generation prompt.

    Raises ValueError for a message that cannot be rendered, naming its number and what was found.
    """
    if isinstance(tokenizer, HFTokenizer):
        return _render_template(tokenizer, messages, add_generation_prompt)
    assert isinstance(tokenizer, Tokenizer), "the control tokens of any other tokenizer are not known"
    rendered = Rendered([tokenizer.bos_id], [False])
    for number, message in enumerate(messages):
        for fragment in message_fragments(message, f"message {number}"):
            ids = [tokenizer.token_id(fragment.text)] if fragment.control else tokenizer.encode(fragment.text)
            rendered.ids.extend(ids)
            rendered.mask.extend([fragment.supervised] * len(ids))
    if add_generation_prompt:
        rendered.ids.append(tokenizer.token_id("<|assistant|>"))
        rendered.mask.append(False)
    return rendered


def message_fragments(message: Message, where: str = "message") -> list[Fragment]:
    """The fragments of one turn, in order.

    {"role": "user", "content": "Hi"} -> <|user|>, Hi, <|end|>
    """
    role, content, reasoning = _check(message, where)
    said = role == "assistant"
    body: list[tuple[str, str]] = []  # (control token that wraps the text or "", text)
    if reasoning:
        body.append(("think", reasoning))
    body.append(("", content))
    tools = [("tools", _tools_text(message["tools"]))] if message.get("tools") else []
    if role == "system":
        body += tools
    body += [("tool_call", _dump(call)) for call in parse_tool_calls(message.get("tool_calls"), where)]
    fragments = [Fragment(f"<|{role}|>", True, False), *_wrap(body, said), Fragment("<|end|>", True, said)]
    if tools and role != "system":  # tools without a system message get an empty system turn
        fragments = [
            Fragment("<|system|>", True, False),
            *_wrap(tools, False),
            Fragment("<|end|>", True, False),
            *fragments,
        ]
    return fragments


def _wrap(body: list[tuple[str, str]], supervised: bool) -> Iterator[Fragment]:
    for name, text in body:
        if name:
            yield Fragment(f"<{name}>", True, supervised)
        yield Fragment(text, False, supervised)
        if name:
            yield Fragment(f"</{name}>", True, supervised)


def _check(message: Message, where: str) -> tuple[str, str, str]:
    """Role, content and reasoning of a message, "" for none. Raises ValueError for what the format has no place for."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: found role {role!r}, expected one of {', '.join(ROLES)}")
    extras = ("tools",) if role == "assistant" else ("tool_calls", "reasoning_content")
    for key in extras:
        if message.get(key):
            raise ValueError(f"{where}: found {key} on a message of role {role}, which cannot carry it")
    others = any(message.get(key) for key in ("tools", "tool_calls", "reasoning_content"))
    reasoning = message.get("reasoning_content")
    for key, value in (("content", content), ("reasoning_content", reasoning)):
        needless = value is None and (others or key != "content")
        if not (isinstance(value, str) or needless):
            raise ValueError(f"{where}: found {key} of type {type(value).__name__}, expected a string")
    return str(role), content or "", reasoning or ""


def parse_tool_calls(tool_calls: JSON, where: str = "message") -> list[dict[str, JSON]]:
    """Separate calls {"name": ..., "arguments": {...}} from a list or a JSON string of them.

    OpenAI's {"type": "function", "function": {...}} is unwrapped, arguments given as JSON text are parsed.
    Raises ValueError where something does not parse.
    """
    if not tool_calls:
        return []
    calls = _parse_json(tool_calls, f"{where}: tool_calls")
    parsed: list[dict[str, JSON]] = []
    for call in [calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict):
            raise ValueError(f"{where}: found the tool call {call!r:.80}, expected an object with name and arguments")
        if isinstance(call.get("arguments"), str):
            call = {**call, "arguments": _parse_json(call["arguments"], f"{where}: arguments of a tool call")}
        parsed.append(call)
    return parsed


def _parse_json(value: JSON, where: str) -> JSON:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: found {value[:80]!r}, expected JSON ({error})") from None


def _dump(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tools_text(tools: JSON) -> str:
    return tools if isinstance(tools, str) else _dump(tools)


def parse_answer(text: str) -> Message:
    """An answer's text with its control tokens' names -> message, so that it is rendered again as it was written.

    "<think>2+2</think>4" -> {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    """
    message: Message = {"role": "assistant"}
    if thought := re.match(r"\s*<think>(.*?)</think>", text, re.DOTALL):
        message["reasoning_content"], text = thought[1], text[thought.end() :]
    form = r"<tool_call>(.*?)</tool_call>"
    try:
        calls = [json.loads(call) for call in re.findall(form, text, re.DOTALL)]
    except ValueError:  # not a call that could be rendered: it stays in the text
        calls = []
    if calls and all(isinstance(call, dict) for call in calls):
        message["tool_calls"], text = calls, re.sub(form, "", text, flags=re.DOTALL)
    message["content"] = text
    return message


# Other models' templates ----------------------------------------------------------------------

FIRST_PLACEHOLDER = 0xF0000  # private-use characters, which no template contains


class _Placeholders:
    """Stands one private-use character in for each text, so that a template never sees what people wrote.

    "<|im_end|> hi" of message 1 -> "\\U000f0000", and the rendered template says where that text belongs.
    """

    def __init__(self, control_names: list[str]) -> None:
        self.texts: dict[str, tuple[str, int]] = {}  # placeholder -> (text, number of its message)
        self._control_names = control_names

    def hide(self, text: str, number: int) -> str:
        """A placeholder for `text`; an empty text stays, since templates ask whether there is any."""
        if not text:
            return text
        placeholder = chr(FIRST_PLACEHOLDER + len(self.texts))
        self.texts[placeholder] = (text, number)
        return placeholder

    def hide_in_json(self, value: JSON, number: int) -> JSON:
        """Hide those strings of a JSON value that could be taken for control tokens or placeholders."""
        if isinstance(value, dict):
            return self.hide_in_object(value, number)
        if isinstance(value, list):
            return [self.hide_in_json(item, number) for item in value]
        return self._hide_dangerous(value, number) if isinstance(value, str) else value

    def hide_in_object(self, value: dict[str, JSON], number: int) -> dict[str, JSON]:
        """`hide_in_json` of an object, its keys included."""
        return {self._hide_dangerous(k, number): self.hide_in_json(v, number) for k, v in value.items()}

    def _hide_dangerous(self, text: str, number: int) -> str:
        if any(name in text for name in self._control_names) or any(ord(c) >= FIRST_PLACEHOLDER for c in text):
            return self.hide(_dump(text)[1:-1], number)  # as it is written inside a JSON string
        return text

    def split(self, rendered: str) -> list[str]:
        """[template text, placeholder, template text, ..., template text]"""
        return re.split("([" + "".join(self.texts) + "])", rendered) if self.texts else [rendered]


def _render_template(tokenizer: HFTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
    """Render with the folder's own template: only its own text may hold special tokens."""
    places = _Placeholders(tokenizer.control_names)
    hidden, tools = _hide_messages(messages, places)
    parts = places.split(tokenizer.apply_template(hidden, tools, add_generation_prompt))

    def speaking(i: int) -> int | None:
        """Number of the assistant message whose text part `i` is, else None."""
        number = places.texts[parts[i]][1] if 0 < i < len(parts) else None
        return number if number is not None and messages[number]["role"] == "assistant" else None

    rendered = Rendered([], [])
    for i, part in enumerate(parts):
        if i % 2:
            runs = [(tokenizer.encode(places.texts[part][0]), speaking(i) is not None)]
        else:
            runs = _template_runs(tokenizer, part, speaking(i - 1), speaking(i + 1))
        for ids, supervised in runs:
            rendered.ids.extend(ids)
            rendered.mask.extend([supervised] * len(ids))
    return rendered


def _template_runs(
    tokenizer: HFTokenizer, part: str, before: int | None, after: int | None
) -> list[tuple[list[int], bool]]:
    """(ids, supervised) of template text between the texts of assistant messages `before` and `after`."""
    if before is not None and before == after:  # inside one turn, e.g. between reasoning and content
        return [(tokenizer.encode_template(part), True)]
    # What stands between the assistant's header and its first text (an opening <think>) is its own too.
    header = tokenizer.generation_header
    cut = part.rfind(header) + len(header) if after is not None and header and header in part else len(part)
    ids = tokenizer.encode_template(part[:cut])
    end = 0
    if before is not None:
        end = next((j + 1 for j, token_id in enumerate(ids) if token_id in tokenizer.stop_ids), 0)
    return [(ids[:end], True), (ids[end:], False), (tokenizer.encode_template(part[cut:]), True)]


def _hide_messages(messages: Sequence[Message], places: _Placeholders) -> tuple[list[Message], JSON]:
    """Messages in the form Hugging Face's templates expect, their texts hidden, and the tools."""
    hidden: list[Message] = []
    tools: JSON = None
    for number, message in enumerate(messages):
        where = f"message {number}"
        role, content, reasoning = _check(message, where)
        turn: Message = {"role": role, "content": places.hide(content, number)}
        if reasoning:
            turn["reasoning_content"] = places.hide(reasoning, number)
        if message.get("tools"):
            tools = places.hide_in_json(_parse_json(message["tools"], f"{where}: tools"), number)
            tools = [tools] if isinstance(tools, dict) else tools
        calls: list[JSON] = []
        for call in parse_tool_calls(message.get("tool_calls"), where):
            call = places.hide_in_object(call, number)
            # A call's name is always hidden: a turn that is only a call must be seen as the assistant's.
            name = places.hide(cast(str, call.get("name", "")), number)  # that it is a string, nothing has checked
            calls.append({"type": "function", "function": {**call, "name": name}})
        if calls:
            turn["tool_calls"] = calls
        hidden.append(turn)
    return hidden, tools
