"""Rows of a benchmark in, checked items and their prompts out: what is asked, and which answers are judged.

    {"id": "arc-1", "task": "arc_easy", "lang": "en", "kind": "choice", "question": "What is frozen water?",
     "choices": ["ice", "steam"], "answer": 0}
    -> Item(...); prompts(item) -> [("Question: What is frozen water?\\nAnswer:", " ice"), (..., " steam")]

    kind      answer            judged by
    choice    index of choices  which choice is likeliest
    cloze     text              whether the likeliest tokens are the answer's, and how likely it is
    generate  text              what is written after the question

`id`, `task`, `subject` and `lang` may be left out: file and line, the file's name, none, and what the question is
written in. A row with "suffix" scores this end of its choices, each after its own beginning (WinoGrande). Examples for
few-shot prompts of X.jsonl are the rows of X.fewshot.jsonl beside it, of the item's own subject.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from dataset import DataError, Message
from dataset.forms import Form, Value
from dataset.records import Row, read_rows

KINDS = ("choice", "cloze", "generate")
WORDS = {"en": ("Question: ", "Answer:"), "zh": ("问题：", "答案：")}
GO_ON = ("copa", "hellaswag")  # tasks whose question is the beginning of a sentence, which the choices end
ASKS = re.compile(r"^(Question:|问题：)", re.MULTILINE)  # of a question that brings its own word, after a passage
CHINESE = re.compile("[\u4e00-\u9fff]")


class Prompt(NamedTuple):
    """Two texts: what is read, and what is judged after it."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """One checked row."""

    id: str
    task: str
    subject: str
    lang: Literal["en", "zh"]  # which words the prompt has
    kind: Literal["choice", "cloze", "generate"]
    question: str
    choices: tuple[str, ...]  # of a choice
    answer: int | str
    suffix: str = ""
    examples: tuple["Item", ...] = ()

    @property
    def goes_on(self) -> bool:
        """Whether it is a text to go on with, and no question."""
        return self.kind == "cloze" or bool(self.suffix) or not self.question or self.task in GO_ON

    @property
    def right(self) -> str:
        """The right answer's text."""
        return self.choices[self.answer] if isinstance(self.answer, int) else self.answer

    @property
    def chance(self) -> float:
        """How often a guess is right."""
        return 1 / len(self.choices) if self.choices else 0.0


class ItemForm(Form):
    """How rows of a benchmark look. No stage trains on them, so it is not one of FORMS."""

    name = stage = "benchmark"
    keys = frozenset({"kind", "question", "answer"})
    expected = (
        '{"kind": "choice", "question": "...", "choices": ["...", "..."], "answer": 0}, or {"kind": "cloze" or '
        '"generate", "question": "...", "answer": "..."}'
    )
    token_columns: ClassVar[tuple[str, ...]] = ()

    def check(self, row: Value) -> Value:
        """Raises ValueError for a row that cannot be asked or judged."""
        if missing := [key for key in sorted(self.keys) if key not in row]:
            raise ValueError(f"found no {missing[0]}, expected {self.expected}")
        if row["kind"] not in KINDS:
            raise ValueError(f"found the kind {row['kind']!r}, expected one of {', '.join(KINDS)}")
        for key in ("id", "task", "subject", "lang", "question", "suffix"):
            if not isinstance(row.get(key, ""), str):
                raise ValueError(f"found {key} of type {type(row[key]).__name__}, expected a text")
        if row.get("lang", "en") not in WORDS:
            raise ValueError(f"found the lang {row['lang']!r}, expected one of {', '.join(WORDS)}")
        (self.check_choices if row["kind"] == "choice" else self.check_answer)(row)
        return row

    def check_choices(self, row: Value) -> None:
        choices, answer, suffix = row.get("choices", ()), row["answer"], row.get("suffix", "")
        listed = isinstance(choices, list) and len(choices) > 1
        if not listed or not all(isinstance(each, str) and each.strip() for each in choices):
            raise ValueError(f"found the choices {choices!r:.80}, expected a list of two texts or more")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(f"found the answer {answer!r:.80}, expected a choice's number, 0 to {len(choices) - 1}")
        if wrong := [each for each in choices if not each.endswith(suffix) or each == suffix]:
            raise ValueError(f"found the choice {wrong[0]!r:.80}, expected a beginning and then the suffix {suffix!r}")

    def check_answer(self, row: Value) -> None:
        answer = row["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"found the answer {answer!r:.80}, expected a text")
        if not row["question"].strip():
            raise ValueError(f"found no question for an answer of kind {row['kind']}")


def read_items(path: str | Path, *, shots: int = 0, max_rows: int = 0) -> list[Item]:
    """A file's items, or its first `max_rows` (0: all), each with up to `shots` examples of its subject.

    Raises DataError for a bad row or an id that comes twice, FileNotFoundError where a file is not there, and
    ValueError where examples are asked for and none are.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one of rows like {ItemForm.expected}")
    examples = read_examples(str(path), shots) if shots else {}
    items: dict[str, Item] = {}
    for row in islice(read_rows([str(path)], ItemForm()), max_rows or None):
        item = item_of(row, examples)
        if item.id in items:
            raise DataError(f"{row.where}: found the id {item.id!r} a second time, expected one for every row")
        items[item.id] = item
    return list(items.values())


def read_examples(path: str, shots: int) -> Mapping[str, tuple[Item, ...]]:
    """The first `shots` examples of every subject."""
    beside = Path(path).with_name(f"{Path(path).name.partition('.jsonl')[0]}.fewshot.jsonl")
    if not beside.is_file():
        raise ValueError(
            f"{path}: --shots {shots} takes its examples from {beside.name} beside it, which is not there; "
            "leave --shots out for this file"
        )
    found: dict[str, list[Item]] = defaultdict(list)
    for row in read_rows([str(beside)], ItemForm()):
        example = item_of(row, {})
        if len(found[example.subject]) < shots:
            found[example.subject].append(example)
    return {subject: tuple(examples) for subject, examples in found.items()}


def item_of(row: Row, examples: Mapping[str, tuple[Item, ...]]) -> Item:
    value, stem = row.value, Path(row.path).name.partition(".")[0]
    subject, choices = value.get("subject", ""), tuple(value.get("choices", ()) if value["kind"] == "choice" else ())
    written = "zh" if CHINESE.search(value["question"] + "".join(choices)) else "en"
    return Item(
        value.get("id", f"{stem}:{row.line}"), value.get("task", stem), subject, value.get("lang", written),
        value["kind"], value["question"], choices, value["answer"], value.get("suffix", ""), examples.get(subject, ()),
    )  # fmt: skip


# Prompts ------------------------------------------------------------------------------------------------------------


def prompts(item: Item) -> list[Prompt]:
    """As plain text: one for every choice, or one for the answer; of `generate` the context is what counts.

    A space stands before what is judged, in Chinese too, so that no token reaches over the border.
    """
    if item.suffix:
        return [Prompt(examples(item) + each.removesuffix(item.suffix), item.suffix) for each in item.choices]
    before, space = examples(item) + question(item), " " if item.question else ""
    return [Prompt(before, space + each) for each in item.choices or (item.right,)]


def question(item: Item) -> str:
    """What stands before an answer: "Question: ...\\nAnswer:", or a text to go on with as it is."""
    if item.goes_on:
        return item.question
    asks, answers = WORDS[item.lang]
    asks = "" if ASKS.search(item.question) else asks
    return f"{asks}{item.question}\n{answers}"


def examples(item: Item) -> str:
    """Other items with their answers, a blank line after each."""
    return "".join(f"{question(each)} {each.right}\n\n".lstrip(" ") for each in item.examples)


def messages(item: Item) -> list[Message]:
    """The same as a chat, up to where the assistant answers."""
    turns: list[Message] = []
    for each in item.examples:
        turns += [{"role": "user", "content": each.question}, {"role": "assistant", "content": each.right}]
    return [*turns, {"role": "user", "content": item.question}]


def written_answer(item: Item, text: str) -> str:
    """What a model wrote, up to where it goes on with a question of its own."""
    return text.partition(f"\n{WORDS[item.lang][0].strip()}")[0]


def lines_of(items: Sequence[Item]) -> Iterator[str]:
    """What a reader should know of the items: examples that are missing."""
    fewest = min((len(item.examples) for item in items), default=0)
    most = max((len(item.examples) for item in items), default=0)
    if fewest < most:
        few = sum(len(item.examples) < most for item in items)
        yield f"{few} of {len(items)} items have fewer than {most} examples, {fewest} at least"
