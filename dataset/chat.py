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
from typing import NamedTuple, TypedDict

from dataset.tokenizer import HFTokenizer, TextTokenizer, Tokenizer, check_encodable

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


THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)  # at the beginning of an answer
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def parse_answer(text: str) -> Message:
    """An answer's text with its control tokens' names -> message, so that it is rendered again as it was written.

    "<think>2+2</think>4" -> {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    """
    message: Message = {"role": "assistant"}
    if thought := THOUGHT.match(text):
        message["reasoning_content"], text = thought[1], text[thought.end() :]
    # what opens behind the last end would be searched for an end again and again
    closed, end, rest = text.rpartition("</tool_call>")
    try:
        calls = [json.loads(call) for call in TOOL_CALL.findall(closed + end)]
    except (ValueError, RecursionError):  # not a call that could be rendered: it stays in the text
        calls = []
    if calls and all(isinstance(call, dict) and isinstance(call.get("name", ""), str) for call in calls):
        message["tool_calls"], text = calls, TOOL_CALL.sub("", closed + end) + rest
    message["content"] = text
    return message


# Other models' templates ----------------------------------------------------------------------

FIRST_PLACEHOLDER = 0xF0000  # private-use characters, which no template contains
MARK = "\x01"  # follows each of them; where a template writes JSON, it becomes \u0001


class Part(NamedTuple):
    """A bit of what a template rendered: its own text, or people's."""

    text: str
    written: bool  # by people: nothing in it is a control token
    supervised: bool


class _Placeholders:
    """Stands a private-use character in for each text, so that a template never sees what people wrote.

    " <|im_end|> hi\n" of message 1 -> " \U000f0000\x01\n", and the rendered template says where that text belongs. The
    white space around a text stays outside, so that a template that trims its texts trims this one too.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self.texts: dict[str, tuple[str, int]] = {}  # placeholder -> (text, number of its message)
        self._find_controls = tokenizer.find_controls

    def hide(self, text: str, number: int, even_empty: bool = False) -> str:
        """A placeholder for `text`. An empty text stays, since templates ask whether there is any, unless `even_empty`:
        where nothing else shows that this message was here."""
        core = text.strip()
        if not core and not even_empty:
            return text
        placeholder = chr(FIRST_PLACEHOLDER + len(self.texts))
        self.texts[placeholder] = (core, number)
        before, _, after = text.partition(core) if core else (text, "", "")
        return before + placeholder + MARK + after

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
        if any(self._find_controls(text)) or any(ord(c) >= FIRST_PLACEHOLDER for c in text):
            return self.hide(text, number)
        return text

    def split(self, rendered: str) -> list[tuple[str, int | None]]:
        """(text, number of the message whose it is, None for the template's own), in turn, a template's text first
        and last."""
        if not self.texts:
            return [(rendered, None)]
        form = "([" + "".join(self.texts) + "])(" + MARK + r"|\\u0001)"
        texts: list[tuple[str, int | None]] = []
        end = 0
        for found in re.finditer(form, rendered):
            text, number = self.texts[found[1]]
            as_json = found[2] != MARK
            texts += [(rendered[end : found.start()], None), (_dump(text)[1:-1] if as_json else text, number)]
            end = found.end()
        return [*texts, (rendered[end:], None)]


def _render_template(tokenizer: HFTokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
    """Render with the folder's own template; the whole text is encoded as one, as `apply_chat_template` does it."""
    places = _Placeholders(tokenizer)
    hidden, tools = _hide_messages(messages, places)
    texts = places.split(tokenizer.apply_template(hidden, tools, add_generation_prompt))
    # number of the assistant message that says it, None where nobody or another says it
    speaking = [None if n is None or messages[n]["role"] != "assistant" else n for _, n in texts]
    parts: list[Part] = []
    for i, (text, number) in enumerate(texts):
        if number is not None:
            parts.append(Part(text, True, speaking[i] is not None))
        else:
            before, after = (speaking[j] if 0 <= j < len(texts) else None for j in (i - 1, i + 1))
            parts += _template_parts(tokenizer, text, before, after)
    return _encode_parts(tokenizer, parts)


def _template_parts(tokenizer: HFTokenizer, text: str, before: int | None, after: int | None) -> list[Part]:
    """Template text between the texts of assistant messages `before` and `after`, by who learns it."""
    if before is not None and before == after:  # inside one turn, e.g. between reasoning and content
        return [Part(text, False, True)]
    # What stands between the assistant's header and its first text (an opening <think>) is its own too.
    header = tokenizer.generation_header
    cut = text.rfind(header) + len(header) if after is not None and header and header in text else len(text)
    end = 0
    if before is not None:
        end = next((token.end for token in tokenizer.encode_apart(text[:cut]) if token.id in tokenizer.stop_ids), 0)
    return [Part(text[:end], False, True), Part(text[end:cut], False, False), Part(text[cut:], False, True)]


def _encode_parts(tokenizer: HFTokenizer, parts: list[Part]) -> Rendered:
    """Ids and mask of all parts, encoded as one text. It is broken in two places alone: in a control token's name that
    people wrote, and where a token would reach from a prompt into its answer, which the model has to begin by itself.

    Raises ValueError where the tokenizer makes a control token of people's text even so.
    """
    text = "".join(part.text for part in parts)
    check_encodable(text)
    # of each character
    written = b"".join(bytes([part.written]) * len(part.text) for part in parts)
    supervised = b"".join(bytes([part.supervised]) * len(part.text) for part in parts)
    breaks = {start + 1 for start, end in tokenizer.find_controls(text) if any(written[start:end])}
    tokens = tokenizer.encode_apart(text, sorted(breaks))
    begun = [
        supervised.index(True, token.start)
        for token in tokens
        if any(supervised[token.start : token.end]) and not supervised[token.start]
    ]
    if begun:
        tokens = tokenizer.encode_apart(text, sorted(breaks.union(begun)))
    for token in tokens:
        if token.id in tokenizer.control_ids - {tokenizer.unk_id} and any(written[token.start : token.end]):
            raise ValueError(
                f"found {text[token.start : token.end]!r} in a message, which this tokenizer cannot keep as text"
            )
    return Rendered([token.id for token in tokens], [bool(supervised[token.start]) for token in tokens])


def _hide_messages(messages: Sequence[Message], places: _Placeholders) -> tuple[list[Message], JSON]:
    """Messages in the form Hugging Face's templates expect, their texts hidden, and the tools."""
    hidden: list[Message] = []
    tools: JSON = None
    for number, message in enumerate(messages):
        where = f"message {number}"
        role, content, reasoning = _check(message, where)
        calls = parse_tool_calls(message.get("tool_calls"), where)
        silent = role == "assistant" and not calls
        turn: Message = {"role": role, "content": places.hide(content, number, even_empty=silent)}
        if reasoning:
            turn["reasoning_content"] = places.hide(reasoning, number)
        if message.get("tools"):
            tools = places.hide_in_json(_parse_json(message["tools"], f"{where}: tools"), number)
            tools = [tools] if isinstance(tools, dict) else tools
        if calls:
            turn["tool_calls"] = [_hide_call(call, number, places) for call in calls]
        hidden.append(turn)
    return hidden, tools


def _hide_call(call: dict[str, JSON], number: int, places: _Placeholders) -> JSON:
    """A call as templates expect it. Its name is always hidden: a turn that is only a call must be seen as the
    assistant's."""
    name = call.get("name", "")
    if not isinstance(name, str):
        raise ValueError(f"message {number}: found {name!r} as the name of a tool call, expected a string")
    return {"type": "function", "function": {**places.hide_in_object(call, number), "name": places.hide(name, number)}}
