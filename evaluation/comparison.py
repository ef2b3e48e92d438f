"""Two models side by side: which is right more often on the same items, and what each says to the same prompts.

    differences(a, b)    [Difference(name="arc_easy", items=2139, a=0.31, b=0.34, difference=0.03, low=0.01, ...)]

Items are paired: what both models get right or wrong says nothing of which is better, so only those count that one of
them alone gets right, of which n_a are a's and n_b are b's. The difference's 95 % interval is that of Agresti and Min
(2005, doi:10.1002/sim.1781, adjusted Wald: half an item more in each of the four cells), which holds for few items and
for equal models too. p is that of McNemar's exact test: how often so uneven a split, or a more uneven one, falls to
models that are equally good.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataset import TextTokenizer
from dataset.forms import asked_alone
from evaluation.benchmark import FILE, PICTURE, Outcome, Run, grouped, write_json
from evaluation.benchmark_plot import draw
from evaluation.calibration import Z
from evaluation.health import answer_ids
from model import GPT

TALK = ("Who are you?", "你是谁？", "What is the capital of France?", "为什么天空是蓝色的？")
TEXTS = ("Once upon a time", "The capital of France is", "从前有一座山，", "春天来了，")


@dataclass
class Difference:
    """How much more often b is right than a, on the items of one task and kind, or by length of those of choices."""

    name: str
    kind: str
    by_length: bool
    items: int  # that both were asked
    a: float  # accuracies
    b: float
    only_a: int  # items that one alone has right
    only_b: int
    difference: float  # b - a
    low: float  # its 95 % interval
    high: float
    p: float
    chance: float


@dataclass
class Comparison:
    """What was found, and the runs it was found by."""

    models: list[str]  # a and b
    runs: list[Run] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader should know of the two runs
    answers: list[dict[str, str]] = field(default_factory=list)  # {"prompt", "a", "b"}

    @classmethod
    def of_runs(cls, a: Run, b: Run) -> "Comparison":
        """Of the items that both were asked. Raises ValueError where there are none."""
        ours, theirs = ({each.key: each for each in run.outcomes} for run in (a, b))
        both = [key for key in ours if key in theirs]
        if not both:
            raise ValueError(f"{a.model} and {b.model} have no item in common; ask both the same --benchmark FILES")
        notes = [f"asked otherwise: {name} is {a.how[name]} of a, {b.how[name]} of b" for name in different(a, b)]
        alone = [len(outcomes) - len(both) for outcomes in (ours, theirs)]
        if any(alone):
            notes.append(f"left out, since one alone was asked: {alone[0]} items of a, {alone[1]} of b")
        found = differences([(ours[key], theirs[key]) for key in both])
        return cls([a.model, b.model], [a, b], found, notes)

    def ask(self, both: Sequence[tuple[GPT, TextTokenizer, bool]], prompts: Sequence[str], max_new_tokens: int) -> None:
        """Put prompts to both models: (model, tokenizer, whether it chats)."""
        a, b = (answers_to(*each, prompts, max_new_tokens) for each in both)
        self.answers = [{"prompt": p, "a": x, "b": y} for p, x, y in zip(prompts, a, b, strict=True)]

    def summary(self) -> dict[str, Any]:
        """All but the runs."""
        return {name: value for name, value in asdict(self).items() if name != "runs"}

    def leave(self, folder: Path) -> list[Path]:
        """Write all of it into a folder, with a picture where there are scores; the files."""
        folder.mkdir(parents=True, exist_ok=True)
        left = [folder / "comparison.json"]
        write_json(left[0], self.summary() | {"runs": [run.to_json() for run in self.runs]})
        if self.runs:
            left.append(folder / PICTURE)
            draw(self.runs, left[1])
        return left


def read_run(path: str) -> Run:
    """Of a benchmark.json. Raises FileNotFoundError, or ValueError for another file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a {FILE} that --benchmark left, or a model folder")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error}), expected a {FILE} that --benchmark left") from None
    return Run.from_json(value, path)


def different(a: Run, b: Run) -> list[str]:
    """Names of what changes the scores and is not the same."""
    return [name for name in ("chat", "shots", "max_new_tokens") if a.how.get(name) != b.how.get(name)]


def differences(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[Difference]:
    """Of every task and, where there are several, of all items of a kind."""
    firsts = {id(a): (a, b) for a, b in pairs}
    outcomes = [a for a, _ in pairs]
    groups = grouped(outcomes, lambda each: (each.task, each.kind))
    if len(groups) > 1:
        groups += [(("all", kind), own) for kind, own in grouped(outcomes, lambda each: each.kind)]
    found = []
    for (name, kind), own in groups:
        both = [firsts[id(each)] for each in own]
        found.append(difference(name, kind, both, by_length=False))
        if kind == "choice":
            found.append(difference(name, kind, both, by_length=True))
    return found


def difference(name: str, kind: str, pairs: Sequence[tuple[Outcome, Outcome]], by_length: bool) -> Difference:
    right = [tuple(bool(each.right_by_length if by_length else each.right) for each in pair) for pair in pairs]
    n, only_a, only_b = len(right), right.count((True, False)), right.count((False, True))
    a, b = (sum(each[i] for each in right) / n for i in (0, 1))
    chance = math.fsum(first.chance for first, _ in pairs) / n
    low, high = paired_interval(only_a, only_b, n)
    return Difference(
        name, kind, by_length, n, a, b, only_a, only_b,
        (only_b - only_a) / n, low, high, mcnemar(only_a, only_b), chance,
    )  # fmt: skip


def paired_interval(only_a: int, only_b: int, items: int) -> tuple[float, float]:
    """Where the true difference of two paired shares lies with 95 %: Agresti and Min (2005), adjusted Wald."""
    n, b, c = items + 2, only_b + 0.5, only_a + 0.5
    middle = (b - c) / n
    half = Z * math.sqrt((b + c) / n - middle**2) / math.sqrt(n)
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact test's p, two-sided: of n fair throws, so few of one side or fewer, twice; at most 1."""
    n, few = only_a + only_b, min(only_a, only_b)
    tail = ways = 1
    for k in range(1, few + 1):
        ways = ways * (n - k + 1) // k  # n over k
        tail += ways
    return min(1.0, 2 * tail / 2**n)  # whole numbers, which Python divides whatever their size


# Answers ------------------------------------------------------------------------------------------------------------


def prompts_for(chat: bool) -> Sequence[str]:
    """What models are asked where nobody says."""
    return TALK if chat else TEXTS


def answers_to(
    model: GPT, tokenizer: TextTokenizer, chat: bool, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers to single questions, or how texts go on. Raises ValueError for a prompt that fills the context."""
    ids = [asked_alone(tokenizer, each, chat) for each in prompts]
    answers = answer_ids(model, tokenizer, ids, max_new_tokens=max_new_tokens)
    return [tokenizer.decode(each.ids, skip_control=False).strip() for each in answers]
