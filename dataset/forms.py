"""The forms a row may have, each with all that depends on it: what is expected, how it is checked, split and encoded.

    {"text": "Hi"}                         TEXT          ids [1, 912, 2]                         <s> text </s>
    {"conversations": [user, assistant]}   CONVERSATION  ids [...], spans [7, 12]                7..12 are the answer's
    {"chosen": [...], "rejected": [...]}   PAIR          chosen [...], rejected [...], prompt 7  7 tokens are shared
    {"conversations": [user], "gt": ["5"]} PROMPT        ids [...], row '{...}'                  nothing: answers come
    {"conversations": [...], "label": true}    LABELLED  the same, the answer chosen and nothing rejected, or reverse
    {"chosen": [...], "rejected": [...]}   SCORED        as PAIR; what is learnt is a number of each answer, at its end

A form knows JSON values and token ids; where a row stands (`path:line`) is known by who reads it (dataset/records.py),
so what is wrong with a row is a ValueError here. A new form is a class here and a name in FORMS.
"""

import json
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from dataset.chat import ROLES, Message, render_chat
from dataset.columns import Report
from dataset.tokenizer import TextTokenizer

Value = dict[str, Any]  # a row's JSON object


class Rendered(NamedTuple):
    """One sequence of a row, not cut: the whole row, or one side of a preference pair."""

    name: str  # "", "chosen" or "rejected"
    ids: list[int]
    supervised: list[bool]


class Tokens(NamedTuple):
    """A row as its Arrow columns hold it."""

    columns: dict[str, list[int] | int | str]
    total: int
    supervised: int  # of them; the first token of a document is read but never predicted


class Form:
    """What everybody may ask about the rows of one shape."""

    name: ClassVar[str]
    stage: ClassVar[str]  # the first stage that reads it; names its cache, and is what scores call it
    keys: ClassVar[frozenset[str]]  # that a row must have
    expected: ClassVar[str]  # how a row looks
    too_long: ClassVar[str] = "cut, or dropped where no answer is left"  # what becomes of a row over max_seq_len
    token_columns: ClassVar[tuple[str, ...]]  # Arrow columns that are lists of tokens
    other_columns: ClassVar[dict[str, pa.DataType]] = {}
    cache: ClassVar[str] = ""  # names its cache, where another form of the stage has the stage's name
    rows: ClassVar[str] = "TextRows"  # what packs the columns; by its name in loader.py, which needs torch

    def normalise(self, row: Value) -> Value:
        """The row as this form writes it, where the file has another spelling of it that is known by its keys."""
        return row

    def check(self, row: Value) -> Value:
        """The row as this form writes it. Raises ValueError, saying what was found and what was expected, for one that
        is not of this form."""
        raise NotImplementedError

    def split_key(self, row: Value) -> str:
        """What decides, by its hash, whether a row is held out; rows with one key stay on one side."""
        raise NotImplementedError

    def render(self, row: Value, tokenizer: TextTokenizer) -> list[Rendered]:
        """The row's sequences. Raises ValueError for messages that the chat template cannot say."""
        raise NotImplementedError

    def encode(self, row: Value, tokenizer: TextTokenizer, max_seq_len: int, report: Report) -> Tokens | None:
        """The row in tokens, cut to what a packed row holds. None for one that is dropped; drops and cuts are
        counted."""
        raise NotImplementedError


class TextForm(Form):
    name, stage = "text", "pretrain"
    keys = frozenset({"text"})
    expected = '{"text": "..."}'
    too_long = "split, nothing is lost"
    token_columns = ("ids",)

    def check(self, row: Value) -> Value:
        check_keys(row, self)
        check_text(row["text"], "text")
        return row

    def split_key(self, row: Value) -> str:
        return row["text"]

    def render(self, row: Value, tokenizer: TextTokenizer) -> list[Rendered]:
        ids = encode_document(tokenizer, tokenizer.encode(row["text"]))
        return [Rendered("", ids, [False] + [True] * (len(ids) - 1))]

    def encode(self, row: Value, tokenizer: TextTokenizer, max_seq_len: int, report: Report) -> Tokens | None:
        ids = tokenizer.encode(row["text"])
        if not ids:
            report.dropped["empty text"] += 1
            return None
        ids = encode_document(tokenizer, ids)
        return Tokens({"ids": ids}, len(ids), len(ids) - 1)


class ConversationForm(Form):
    name, stage = "conversation", "full_sft"
    keys = frozenset({"conversations"})
    expected = '{"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    token_columns = ("ids",)
    other_columns: ClassVar[dict[str, pa.DataType]] = {"spans": pa.list_(pa.int32())}

    def normalise(self, row: Value) -> Value:
        """{"messages": ...}, Alpaca's {"instruction": ..., "input": ..., "output": ...} and ShareGPT's
        {"conversations": [{"from": "human", "value": ...}, ...]} as conversations."""
        if "conversations" in row:
            return from_sharegpt(row)
        if "messages" in row:
            return {"conversations" if key == "messages" else key: value for key, value in row.items()}
        return from_alpaca(row) if {"instruction", "output"} <= row.keys() else row

    def check(self, row: Value) -> Value:
        check_keys(row, self)
        row = self.normalise(row)
        check_messages(row["conversations"], "conversations")
        return row

    def split_key(self, row: Value) -> str:
        """What is said before the first answer."""
        messages = row["conversations"]
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        return json.dumps(messages[:first], ensure_ascii=False)

    def render(self, row: Value, tokenizer: TextTokenizer) -> list[Rendered]:
        return [Rendered("", *render_chat(tokenizer, row["conversations"]))]

    def encode(self, row: Value, tokenizer: TextTokenizer, max_seq_len: int, report: Report) -> Tokens | None:
        """What is longer than a row is cut at the end of the last answer that fits, else inside the first."""
        rendered = render_chat(tokenizer, row["conversations"])
        ids, spans = rendered.ids, spans_of(rendered.mask)
        limit = max_seq_len + 1  # n + 1 tokens make n pairs of input and label
        if len(ids) > limit:
            ends = [end for _, end in spans if end <= limit]
            whole = max(ends, default=limit)
            ids, spans = ids[:whole], [(start, min(end, whole)) for start, end in spans if start < whole]
            if spans:
                report.cut["at the end of an answer" if ends else "inside an answer"] += 1
                report.cut["tokens left out"] += len(rendered.ids) - whole
        # the very first token is never a label
        if not any(end > max(start, 1) for start, end in spans):
            reason = "no answer in the row" if not any(rendered.mask) else "prompt longer than max_seq_len"
            report.dropped[reason] += 1
            return None
        ids = ids[: spans[-1][1]]  # nothing after the last answer is learnt from
        supervised = sum(end - max(start, 1) for start, end in spans)
        return Tokens({"ids": ids, "spans": [edge for span in spans for edge in span]}, len(ids), supervised)


class PromptForm(ConversationForm):
    """A conversation that the model is to go on with, and what its answer is judged by.

    {"conversations": [user, assistant "5"]}               -> {"conversations": [user], "answer": ["5"]}
    {"conversations": [user, assistant ""], "gt": ["5"]}   -> {"conversations": [user], "gt": ["5"], "answer": ["5"]}
    """

    name, stage = "prompt", "grpo"
    expected = '{"conversations": [{"role": "user", "content": "..."}]}, with an "answer" or "gt" where there is one'
    too_long = "dropped"
    other_columns: ClassVar[dict[str, pa.DataType]] = {"row": pa.string()}
    rows = "PromptRows"

    def check(self, row: Value) -> Value:
        """The row without its last turn where that is the assistant's. "answer" becomes a list: of the row's own
        "answer", else its "gt", else of the turn that is left out, where anything stands in one. Other keys stay."""
        row = super().check(row)
        messages, left_out = row["conversations"], None
        if messages[-1]["role"] == "assistant":
            messages, left_out = messages[:-1], messages[-1]["content"].strip() or None
        if not messages or messages[-1]["role"] == "assistant":
            found = "two answers in a row" if messages else "no message before the answer"
            raise ValueError(f"found {found} at the end of conversations, expected a prompt that an answer can follow")
        answers = next((row[key] for key in ("answer", "gt") if row.get(key) is not None), left_out)
        return row | {"conversations": messages, "answer": list_of_answers(answers)}

    def render(self, row: Value, tokenizer: TextTokenizer) -> list[Rendered]:
        ids, mask = render_chat(tokenizer, row["conversations"], add_generation_prompt=True)
        return [Rendered("", ids, [False] * len(mask))]

    def encode(self, row: Value, tokenizer: TextTokenizer, max_seq_len: int, report: Report) -> Tokens | None:
        ((_, ids, _),) = self.render(row, tokenizer)
        if len(ids) >= max_seq_len:
            report.dropped["prompt longer than max_seq_len"] += 1
            return None
        return Tokens({"ids": ids, "row": json.dumps(row)}, len(ids), 0)


def list_of_answers(value: object) -> list[str | int | float]:
    """ "5" -> ["5"], 5 -> [5], ["a", 5] -> ["a", 5], None -> []. Raises ValueError for anything else."""
    answers: list[str | int | float] = []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(each, bool) or not isinstance(each, (str, int, float)):
            raise ValueError(f"found {kind(each)} as the answer, expected a string, a number, or a list of them")
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"found {each} as the answer, expected a finite number")
        answers.append(each)
    return answers


class PairForm(Form):
    name, stage = "pair", "dpo"
    keys = frozenset({"chosen", "rejected"})
    expected = '{"chosen": [messages...], "rejected": [messages...]}'
    token_columns = ("chosen", "rejected")
    other_columns: ClassVar[dict[str, pa.DataType]] = {"prompt": pa.int32()}
    rows = "PairRows"
    last = 1  # tokens of a sequence beyond max_seq_len: the last is a label alone

    def check(self, row: Value) -> Value:
        if LABELLED.keys <= row.keys() and not is_pair(row):
            raise ValueError(
                f"found one answer with a label, which --loss_type kto learns from, expected {self.expected}"
            )
        check_keys(row, self)
        for side in ("chosen", "rejected"):
            check_messages(row[side], side)
            if (last := row[side][-1]["role"]) != "assistant":
                raise ValueError(f"found a last message of role {last!r} in {side}, expected 'assistant'")
        chosen, rejected = row["chosen"][:-1], row["rejected"][:-1]
        if chosen != rejected:
            differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            turn = next(differ, min(len(chosen), len(rejected)))
            raise ValueError(
                f"found different prompts in chosen and rejected (first difference in message {turn}), "
                "expected one shared prompt and different last turns"
            )
        if not chosen:
            raise ValueError("found no message before the answers, expected a prompt")
        return row

    def asked(self, row: Value) -> list[Message]:
        """What both answers answer."""
        return row["chosen"][:-1]

    def sides(self, row: Value) -> dict[str, list[Message]]:
        """The conversations that end with an answer."""
        return {side: row[side] for side in ("chosen", "rejected")}

    def split_key(self, row: Value) -> str:
        return json.dumps(self.asked(row), ensure_ascii=False)

    def render(self, row: Value, tokenizer: TextTokenizer) -> list[Rendered]:
        prompt = len(self.prompt(row, tokenizer))
        sides = {side: self.side(messages, tokenizer) for side, messages in self.sides(row).items()}
        return [Rendered(side, ids, [i >= prompt for i in range(len(ids))]) for side, ids in sides.items()]

    def prompt(self, row: Value, tokenizer: TextTokenizer) -> list[int]:
        return render_chat(tokenizer, self.asked(row), add_generation_prompt=True).ids

    def side(self, messages: list[Message], tokenizer: TextTokenizer) -> list[int]:
        """Prompt and answer, up to the answer's end: what a template writes after it is learnt by nobody."""
        rendered = render_chat(tokenizer, messages)
        return rendered.ids[: max((i + 1 for i, kept in enumerate(rendered.mask) if kept), default=None)]

    def encode(self, row: Value, tokenizer: TextTokenizer, max_seq_len: int, report: Report) -> Tokens | None:
        """Both answers after one rendering of the prompt; answers are cut at max_seq_len, prompts never. A side
        without an answer is the prompt alone."""
        prompt, limit = self.prompt(row, tokenizer), max_seq_len + self.last
        found = {side: self.side(messages, tokenizer) for side, messages in self.sides(row).items()}
        for side, ids in found.items():
            if ids[: len(prompt)] != prompt:
                raise ValueError(
                    f"the {side} answer changes how its prompt is rendered by this tokenizer's chat template"
                )
        if len(prompt) >= limit:
            report.dropped["prompt longer than max_seq_len"] += 1
            return None
        sides = {"chosen": prompt, "rejected": prompt} | found
        if sides["chosen"][:limit] == sides["rejected"][:limit]:
            within = " within max_seq_len" if sides["chosen"] != sides["rejected"] else ""
            report.dropped[f"same answer on both sides{within}"] += 1
            return None
        if too_long := [ids for ids in sides.values() if len(ids) > limit]:
            report.cut["inside an answer"] += 1
            report.cut["tokens left out"] += sum(len(ids) - limit for ids in too_long)
        chosen, rejected = (sides[side][:limit] for side in ("chosen", "rejected"))
        columns: dict[str, list[int] | int | str] = {"chosen": chosen, "rejected": rejected, "prompt": len(prompt)}
        learnt = len(chosen) + len(rejected) - 2 * len(prompt)
        return Tokens(columns, learnt + len(found) * len(prompt), learnt)


class LabelledForm(PairForm):
    """One answer, which is desirable or not; a pair is one of each."""

    name, cache = "labelled answer", "labelled"
    keys = frozenset({"conversations", "label"})
    expected = '{"conversations": [messages...], "label": true}'
    rows = "LabelledRows"

    def normalise(self, row: Value) -> Value:
        """The spellings of a conversation, with a label beside it."""
        return row | CONVERSATION.normalise(row)

    def check(self, row: Value) -> Value:
        if is_pair(row):
            return PAIR.check(row)
        check_keys(row, self)
        row = self.normalise(row)
        messages = row["conversations"]
        check_messages(messages, "conversations")
        if (last := messages[-1]["role"]) != "assistant":
            raise ValueError(f"found a last message of role {last!r}, expected 'assistant', whose answer is labelled")
        if len(messages) == 1:
            raise ValueError("found no message before the answer, expected a prompt")
        if not isinstance(row["label"], bool):
            raise ValueError(f"found {kind(row['label'])} as label, expected true (desirable) or false")
        return row

    def asked(self, row: Value) -> list[Message]:
        return super().asked(row) if is_pair(row) else row["conversations"][:-1]

    def sides(self, row: Value) -> dict[str, list[Message]]:
        if is_pair(row):
            return super().sides(row)
        return {"chosen" if row["label"] else "rejected": row["conversations"]}


class ScoredForm(PairForm):
    """A pair whose answers get a number each, where their last token is read: it is no label but an input."""

    name, stage = "scored pair", "reward"
    rows = "ScoredRows"
    last = 0

    def side(self, messages: list[Message], tokenizer: TextTokenizer) -> list[int]:
        """As of a pair, without padding tokens at the end: where a tokenizer ends an answer with the token that it pads
        with, transformers looks for the last one before it."""
        ids = super().side(messages, tokenizer)
        while ids and ids[-1] == tokenizer.pad_id:
            ids.pop()
        return ids


TEXT, CONVERSATION, PAIR, PROMPT = TextForm(), ConversationForm(), PairForm(), PromptForm()
LABELLED, SCORED = LabelledForm(), ScoredForm()
FORMS: tuple[Form, ...] = (TEXT, CONVERSATION, PAIR, PROMPT)
"""One a stage, by whose keys a row is told; of several that it fits, the first."""


def is_pair(row: Value) -> bool:
    return PAIR.keys <= row.keys()


def start_document(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    """`<s>` text; a tokenizer without a beginning-of-sequence token starts with the text."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids]


def encode_document(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    """`<s>` text `</s>`."""
    return [*start_document(tokenizer, ids), tokenizer.eos_id]


def asked_alone(tokenizer: TextTokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a prompt with nothing before it: a question to a model that chats, else the beginning of a document."""
    if chat:
        return render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).ids
    return start_document(tokenizer, tokenizer.encode(text))


def spans_of(mask: list[bool]) -> list[tuple[int, int]]:
    """[F, T, T, F, T] -> [(1, 3), (4, 5)]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(mask, dtype=np.int8), [0]))))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


# Other spellings of a conversation; what is wrong in one is left for the checks to name -------------------------------


SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def from_sharegpt(row: Value) -> Value:
    """Messages of {"from": "human", "value": "Hi"} as {"role": "user", "content": "Hi"}; a row's own "system" and
    "tools" become its first message."""
    messages = row["conversations"]
    if not isinstance(messages, list) or not any(isinstance(each, dict) and "from" in each for each in messages):
        return row
    said = [sharegpt_message(each) if isinstance(each, dict) and "from" in each else each for each in messages]
    if row.get("system") or row.get("tools"):
        first = {"role": "system", "content": row.get("system") or ""}
        said.insert(0, first | ({"tools": row["tools"]} if row.get("tools") else {}))
    return {"conversations": said}


def sharegpt_message(message: Value) -> Value:
    role, value = message["from"], message.get("value")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [value] if isinstance(value, dict) else value}
    return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": value}


def from_alpaca(row: Value) -> Value:
    """{"instruction": "Add.", "input": "2 2", "output": "4"} as user "Add.\\n2 2" and assistant "4", after the row's
    "system" and its "history" of [question, answer], where it has them."""
    asked = [part for part in (row["instruction"], row.get("input")) if part not in (None, "")]
    wrong = next((part for part in asked if not isinstance(part, str)), None)
    turns = [["\n".join(asked) if wrong is None else wrong, row["output"]]]
    history = row.get("history") or []
    turns = [*history, *turns] if isinstance(history, list) else [[history, None]]
    messages: list[Value] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in turns:
        question, answer = turn if isinstance(turn, list) and len(turn) == 2 else (turn, None)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": messages}


# Checks: all raise ValueError ----------------------------------------------------------------------------------------


def check_keys(row: Value, form: Form) -> None:
    if form.keys <= form.normalise(row).keys():
        return
    found = f"found the keys {', '.join(map(repr, row)) or '(none)'}"
    for other in FORMS:
        if other.keys <= other.normalise(row).keys():
            raise ValueError(
                f"{found}: a row for train_{other.stage}.py, expected {form.expected} for train_{form.stage}.py"
            )
    raise ValueError(f"{found}, expected {form.expected}")


def check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"found {kind(text)} as {name}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"found half a surrogate pair ({text[error.start]!r}) in {name}, expected whole characters"
        ) from None


def check_messages(messages: object, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        found = kind(messages) if messages != [] else "an empty list"
        raise ValueError(f"found {found} as {name}, expected a list of messages")
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = repr(message.get("role")) if isinstance(message, dict) else kind(message)
            raise ValueError(f"found {found} as the role of {where}, expected one of {', '.join(ROLES)}")
        if message.get("content") is None and message.get("tool_calls"):
            message["content"] = ""
        check_text(message.get("content"), f"{where}.content")
        if message.get("reasoning_content") is not None:
            check_text(message["reasoning_content"], f"{where}.reasoning_content")
        for key in ("tools", "tool_calls"):
            check_json_list(message.get(key), f"{where}.{key}")


def check_json_list(value: object, name: str) -> None:
    """None, an empty string, a list, or a string of JSON that holds a list (or one object)."""
    if value is None or value == "" or isinstance(value, list):
        return
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"found {shorten(str(value))} as {name}, which is not JSON ({error}); expected a JSON list"
        ) from None
    if not isinstance(value, str) or not isinstance(parsed, (list, dict)):
        raise ValueError(f"found {kind(parsed)} as {name}, expected a JSON list, or a string that holds one")
    check_text(value, name)


def kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null (or nothing)",
    }
    return names.get(type(value), type(value).__name__)


def shorten(value: bytes | str, limit: int = 60) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return repr(text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}")
