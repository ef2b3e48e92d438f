"""How many items of a benchmark a model gets right, beside what guessing would: a model and files in, scores out.

    run = judge_files(model, tokenizer, ["arc_easy.jsonl"], how)
    run.outcomes[0]   Outcome(id="arc-1", kind="choice", loglikelihoods=[-8.1, -9.7], choice=0, right=True, ...)
    run.scores[0]     Score(group="task", name="arc_easy", items=2139, accuracy=0.31, low=0.29, high=0.33, chance=0.25)

A choice is right where its text is the likeliest, and right by length where it is the likeliest a character: log p over
the characters of the choice, without the space before it (lm-evaluation-harness calls the two acc and acc_norm). A
cloze is right where each token of the answer is the likeliest one, and has a perplexity, exp of the mean -log p of a
token. What is written is right where its last number is the answer's, or its text where the answer is no number.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from dataset import DataError, TextTokenizer, render_chat
from dataset.forms import start_document
from evaluation.benchmark_plot import draw
from evaluation.calibration import interval
from evaluation.items import Item, lines_of, messages, prompts, read_items, written_answer
from evaluation.likelihood import ALONE, Likelihood, Pair, Ranks, fit, log_likelihoods, split
from evaluation.numerals import last_number
from evaluation.rewards import exact_match, number
from model import GPT, generate

FILE, PICTURE = "benchmark.json", "benchmark.png"
TOO_LONG = "a choice or an answer longer than the context"
CUT = "the beginning, to fit the context"


class How(NamedTuple):
    """How items are asked."""

    chat: bool = False  # questions go through the chat template; texts to go on with never do
    shots: int = 0  # examples before each
    batch_size: int = 16  # items at a time
    max_new_tokens: int = 256  # of a written answer
    max_rows: int = 0  # the first items of a file, 0: all


@dataclass
class Outcome:
    """What came of an item."""

    id: str
    task: str
    subject: str
    lang: str
    kind: str
    answer: int | str
    right: bool
    chance: float
    loglikelihoods: list[float] = field(default_factory=list)  # nats, of every choice, or of the answer
    tokens: list[int] = field(default_factory=list)  # that each of them is the sum of
    choice: int | None = None  # the likeliest
    choice_by_length: int | None = None
    right_by_length: bool | None = None
    written: str | None = None  # by `generate`

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.id


@dataclass
class Score:
    """Of the items of one task, subject or language, and of one kind. low, high: Wilson's 95 % interval."""

    group: str  # "task", "subject" or "lang"
    name: str
    kind: str
    items: int
    accuracy: float
    low: float
    high: float
    chance: float  # accuracy of guessing: mean of 1 / number of choices; 0 where nothing is to choose from
    accuracy_by_length: float | None = None
    low_by_length: float | None = None
    high_by_length: float | None = None
    perplexity: float | None = None  # of a token of a cloze's answer


@dataclass
class Run:
    """A model on files: what is kept in benchmark.json."""

    model: str
    how: dict[str, Any]
    files: list[str]
    scores: list[Score]
    outcomes: list[Outcome]
    counts: dict[str, int]  # of items that were cut or left out
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Without what is None."""
        whole = asdict(self)
        for name in ("scores", "outcomes"):
            whole[name] = [{key: value for key, value in each.items() if value is not None} for each in whole[name]]
        return whole

    def summary(self) -> dict[str, Any]:
        """All but the single items."""
        return {name: value for name, value in self.to_json().items() if name != "outcomes"}

    def leave(self, folder: Path) -> list[Path]:
        """Write benchmark.json and a picture into a folder; the files."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, self.to_json())
        draw([self], folder / PICTURE)
        return [folder / FILE, folder / PICTURE]

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> "Run":
        """Raises ValueError for what `to_json` did not write."""
        try:
            found = cls(**value)
            found.scores = [Score(**each) for each in value["scores"]]
            found.outcomes = [Outcome(**each) for each in value["outcomes"]]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{where}: found no benchmark of eval_model.py ({error}); make it again") from None
        return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """An item a line, so that files can be looked at."""
    text = json.dumps(content, ensure_ascii=False).replace(', {"id": ', ',\n{"id": ')
    path.write_text(text + "\n", encoding="utf-8")


# Asking -------------------------------------------------------------------------------------------------------------


def judge_files(
    model: GPT, tokenizer: TextTokenizer, files: Sequence[str | Path], how: How, *, name: str = "", ranks: Ranks = ALONE
) -> Run:
    """Ask a model in eval mode everything that stands in the files; `name` is what it is called.

    Raises DataError for a bad row, and for an item of one task that stands in two files; ValueError where no item fits.
    """
    items, notes = read_files(files, how)
    outcomes, counts = judge_items(model, tokenizer, items, how, ranks)
    if not outcomes:
        raise ValueError(f"{' '.join(map(str, files))}: no item is left to judge; left out: {counts}")
    return Run(name, how._asdict(), [str(path) for path in files], scores_of(outcomes), outcomes, counts, notes)


def read_files(files: Sequence[str | Path], how: How) -> tuple[list[Item], list[str]]:
    """Items of all files, and what a reader should know of them. Raises as `judge_files`."""
    items: list[Item] = []
    notes: list[str] = []
    for path in files:
        read = read_items(path, shots=how.shots, max_rows=how.max_rows)
        notes += [f"{path}: {note}" for note in lines_of(read)]
        items += read
    if len({(item.task, item.id) for item in items}) < len(items):
        raise DataError(f"{' '.join(map(str, files))}: found an item of one task and id twice; give every file once")
    return items, notes


def judge_items(
    model: GPT, tokenizer: TextTokenizer, items: Sequence[Item], how: How, ranks: Ranks = ALONE
) -> tuple[list[Outcome], dict[str, int]]:
    """Outcomes in the order of the items, and how many items were cut or left out."""
    context, counts = model.config.max_seq_len, {CUT: 0, TOO_LONG: 0}
    judged: dict[int, list[Pair]] = {}
    for i, item in enumerate(items):
        if item.kind == "generate":
            continue
        whole = pairs(tokenizer, item, how.chat)
        fitting = [pair for pair in (fit(each, context) for each in whole) if pair is not None]
        if len(fitting) < len(whole):
            counts[TOO_LONG] += 1
            continue
        counts[CUT] += fitting != whole
        judged[i] = fitting
    likely = log_likelihoods(model, list(judged.values()), batch_size=how.batch_size, ranks=ranks)
    found = {i: judged_outcome(items[i], each) for i, each in zip(judged, likely, strict=True)}
    written = {i: item for i, item in enumerate(items) if item.kind == "generate"}
    found |= write(model, tokenizer, written, how, counts, ranks)
    return [found[i] for i in sorted(found)], {what: count for what, count in counts.items() if count}


def pairs(tokenizer: TextTokenizer, item: Item, chat: bool) -> list[Pair]:
    """What is judged: a pair for every choice, or one for the answer."""
    if not chat or item.goes_on:
        return [split(tokenizer, *prompt) for prompt in prompts(item)]
    before = render_chat(tokenizer, messages(item), add_generation_prompt=True).ids
    return [Pair([*before, *tokenizer.encode(each)], len(before)) for each in item.choices or (item.right,)]


def judged_outcome(item: Item, likely: Sequence[Likelihood]) -> Outcome:
    nats = [each.nats for each in likely]
    outcome = outcome_of(item, likely[0].greedy)
    outcome.loglikelihoods, outcome.tokens = [round(each, 6) for each in nats], [each.tokens for each in likely]
    if item.kind == "choice":
        places = range(len(nats))
        outcome.choice = max(places, key=lambda i: nats[i])  # of equal ones the first
        outcome.choice_by_length = max(places, key=lambda i: nats[i] / len(item.suffix or item.choices[i]))
        outcome.right, outcome.right_by_length = (
            each == item.answer for each in (outcome.choice, outcome.choice_by_length)
        )
    return outcome


def outcome_of(item: Item, right: bool) -> Outcome:
    return Outcome(item.id, item.task, item.subject, item.lang, item.kind, item.answer, right, item.chance)


def write(
    model: GPT, tokenizer: TextTokenizer, items: dict[int, Item], how: How, counts: dict[str, int], ranks: Ranks
) -> dict[int, Outcome]:
    """Greedy answers, of at most half the context; of a longer prompt its end is read."""
    most = min(how.max_new_tokens, max(1, model.config.max_seq_len // 2))
    asked = {i: asked_ids(tokenizer, item, how.chat) for i, item in items.items()}
    room = model.config.max_seq_len - most
    order = sorted(asked, key=lambda i: -len(asked[i]))
    counts[CUT] += sum(len(ids) > room for ids in asked.values())
    batches = [order[first : first + how.batch_size] for first in range(0, len(order), how.batch_size)]

    def do(numbers: list[int]) -> list[tuple[int, str]]:
        answers = generate(
            model, [asked[i][-room:] for i in numbers], max_new_tokens=most, temperature=0,
            stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        return [(i, tokenizer.decode(each.ids, skip_control=False)) for i, each in zip(numbers, answers, strict=True)]

    return {i: written_outcome(items[i], text) for i, text in ranks.share(batches, do, "answering").items()}


def asked_ids(tokenizer: TextTokenizer, item: Item, chat: bool) -> list[int]:
    if chat:
        return render_chat(tokenizer, messages(item), add_generation_prompt=True).ids
    return start_document(tokenizer, tokenizer.encode(prompts(item)[0].context))


def written_outcome(item: Item, text: str) -> Outcome:
    text = written_answer(item, text)
    row: dict[str, Any] = {"answer": [item.right], "finish_reason": "stop"}
    is_number = last_number(item.right) is not None and not any(each.isalpha() for each in item.right)
    judge = number if is_number else exact_match
    outcome = outcome_of(item, judge([], text.strip(), row) == 1)
    outcome.written = text
    return outcome


# Counting -----------------------------------------------------------------------------------------------------------


def scores_of(outcomes: Sequence[Outcome]) -> list[Score]:
    """Of every task, every language, and every subject of a task that has several: by name."""
    groups: dict[str, Callable[[Outcome], str]] = {
        "task": lambda each: each.task,
        "lang": lambda each: each.lang,
        "subject": lambda each: f"{each.task} / {each.subject}",
    }
    subjects = {task: len({each.subject for each in own}) for task, own in grouped(outcomes, groups["task"])}
    found = []
    for group, name in groups.items():
        counted = [each for each in outcomes if group != "subject" or subjects[each.task] > 1]
        by_kind = [(kind, own) for kind, own in grouped(counted, lambda each: each.kind)]
        found += [score(group, called, kind, each) for kind, own in by_kind for called, each in grouped(own, name)]
    return found


def grouped(outcomes: Iterable[Outcome], key: Callable[[Outcome], Any]) -> list[tuple[Any, list[Outcome]]]:
    return [(name, list(own)) for name, own in groupby(sorted(outcomes, key=key), key)]


def score(group: str, name: str, kind: str, outcomes: Sequence[Outcome]) -> Score:
    """Of outcomes of one kind."""
    n, right = len(outcomes), sum(each.right for each in outcomes)
    chance = math.fsum(each.chance for each in outcomes) / n
    found = Score(group, name, kind, n, right / n, *interval(right, n), chance)
    if kind == "choice":
        right = sum(bool(each.right_by_length) for each in outcomes)
        found.accuracy_by_length, (found.low_by_length, found.high_by_length) = right / n, interval(right, n)
    if kind == "cloze":
        nats = math.fsum(each.loglikelihoods[0] for each in outcomes)
        found.perplexity = math.exp(min(-nats / sum(each.tokens[0] for each in outcomes), 700.0))
    return found
