"""What an answer is worth: samples in, a number each out, and the parts it is made of.

    reward = Reward(["number", "format"], weights=[1.0, 0.5])
    reward([Sample([{"role": "user", "content": "6 x 7?"}], "<think>6 x 7</think>42", {"answer": ["42"]})])
    -> Scores(total=[1.5], parts={"number": [1.0], "format": [1.0]})

A reward is a function `(messages, answer, row) -> float`: what was said before, the answer's text with its control
tokens' names (<think>, <tool_call>), and the row of the data file, as its form writes it, with "finish_reason" added:
"stop" for an answer that ended by itself, "length" for one that was cut. Those here are found by name in FUNCTIONS, a
user's own is `file.py:function`. One that is better asked for many answers at once (a reward model) is a `Judge`, and
is given to `Reward` by whoever can build it.
"""

import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from dataset.chat import Message, parse_answer
from dataset.forms import Value
from evaluation.numerals import last_number, numbers_in, same
from evaluation.tools import MalformedCall, calls_in
from evaluation.wording import folded, loops, overlap, unspaced, words_of
from evaluation.world import judge


class Sample(NamedTuple):
    """One answer and all that it is judged by."""

    messages: Sequence[Message]  # before the answer: the prompt, and turns of tools since
    answer: str
    row: Value
    finish_reason: str = "stop"  # or "length"
    where: str = ""  # of the row: path:line


class Scores(NamedTuple):
    """Of several samples, in their order."""

    total: list[float]  # weighted sums
    parts: dict[str, list[float]]  # short name of a reward -> its values, before weights


RewardFunction = Callable[[Sequence[Message], str, Value], float]
Judge = Callable[[Sequence[Sample]], Sequence[float]]


class RewardError(ValueError):
    """A reward that gave no finite number; the message names the row and the reward."""


class Reward:
    """The weighted sum of several rewards."""

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        judges: Mapping[str, Callable[[str], Judge]] | None = None,
    ) -> None:
        """names: as they are typed, `name` or `name:option`. weights: one for each, 1 where left out. judges: further
        names, and what makes a judge of an option: {"reward_model": load} for `reward_model:out/reward_128`.

        Raises ValueError for a name that is not known, a wrong option, or another number of weights.
        """
        weights = [1.0] * len(names) if weights is None else list(weights)
        if not names or len(weights) != len(names):
            raise ValueError(
                f"found {len(names)} rewards and {len(weights)} weights, expected one weight for each reward"
            )
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"found the reward {min(twice)} twice; give it a weight of 2 instead")
        if wrong := [weight for weight in weights if not math.isfinite(weight)]:
            raise ValueError(f"found the weight {wrong[0]}, expected finite numbers")
        self.names, self.labels, self.weights = list(names), labels_of(names), weights
        self.judges = [build(name, judges or {}) for name in names]

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Raises RewardError for a reward that raises, or gives anything but a finite number a sample."""
        parts = {
            label: checked(name, judge, samples)
            for label, name, judge in zip(self.labels, self.names, self.judges, strict=True)
        }
        columns = zip(*parts.values(), strict=True)
        total = [math.fsum(w * value for w, value in zip(self.weights, values, strict=True)) for values in columns]
        return Scores(total, parts)


def checked(name: str, judge: Judge, samples: Sequence[Sample]) -> list[float]:
    """A judge's values as finite floats. Raises RewardError for any that is none."""
    values = judge(samples)
    if len(values) != len(samples):
        raise RewardError(f"reward {name}: found {len(values)} values for {len(samples)} answers")
    return [finite(value, name, sample.where) for value, sample in zip(values, samples, strict=True)]


def finite(value: object, name: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        return number
    found = repr(value)[:80] if isinstance(value, Real) else f"{repr(value)[:80]} ({type(value).__name__})"
    raise RewardError(f"{at(where)}reward {name}: found {found}, expected a finite number")


def at(where: str) -> str:
    return f"{where}: " if where else ""


def each(name: str, function: RewardFunction) -> Judge:
    """The judge that asks a function answer by answer."""

    def judge(samples: Sequence[Sample]) -> list[float]:
        return [ask(name, function, sample) for sample in samples]

    return judge


def ask(name: str, function: RewardFunction, sample: Sample) -> float:
    try:
        row = sample.row | {"finish_reason": sample.finish_reason}
        return finite(function(sample.messages, sample.answer, row), name, sample.where)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may do anything, and must not end a run unsaid
        (*_, last) = traceback.extract_tb(error.__traceback__)
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise RewardError(
            f"{at(sample.where)}reward {name}: {said} ({Path(last.filename).name}:{last.lineno}); "
            f"the answer was {sample.answer[:80]!r}"
        ) from error


# From a name to a function --------------------------------------------------------------------------------------------


def build(name: str, judges: Mapping[str, Callable[[str], Judge]]) -> Judge:
    """Raises ValueError where the name or its option is not known."""
    if is_file(name):
        return each(name, load_function(name))
    base, _, option = name.partition(":")
    if base in judges:
        return judges[base](option)
    if base not in FUNCTIONS:
        known = ", ".join([*FUNCTIONS, *judges, "file.py:function"])
        raise ValueError(f"found the reward {name!r}, expected one of {known}")
    return each(name, FUNCTIONS[base](option))


def is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def short_name(name: str) -> str:
    """What a part is logged by: "length:200" -> "length", "my/rewards.py:polite" -> "polite"."""
    return name.rpartition(":")[2] if is_file(name) else name.partition(":")[0]


def labels_of(names: Sequence[str]) -> list[str]:
    """What the parts are logged by: short names, or whole ones where two would be the same."""
    short = [short_name(name) for name in names]
    return [name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)]


def load_function(name: str) -> RewardFunction:
    """`path/file.py:function`: the file is run, here and once, and the function taken from it.

    Raises ValueError where there is no such file or function, or where the file cannot be run.
    """
    path, _, function = name.rpartition(":")
    if not path:
        raise ValueError(f"found {name!r}, expected file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; a reward of your own is given as file.py:function")
    try:
        names = vars(run_file(path))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: found {type(error).__name__}: {error}, when it was run") from error
    if not callable(names.get(function)):
        there = [key for key, value in names.items() if isfunction(value)]
        raise ValueError(f"{path}: found no function {function}, expected one of {', '.join(there) or '(none there)'}")
    loaded: RewardFunction = names[function]
    return loaded


def run_file(path: str) -> ModuleType:
    """The file as a module, run once however many functions are taken from it."""
    name = str(Path(path).resolve())
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "of a .py file"
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# The rewards that are here: each takes the option behind its name, "" for none ----------------------------------------


def no_option(name: str, function: RewardFunction) -> Callable[[str], RewardFunction]:
    def build(option: str) -> RewardFunction:
        if option:
            raise ValueError(f"found the option {option!r} of the reward {name}, which takes none")
        return function

    return build


def content(answer: str) -> str:
    """An answer's text without its reasoning and its calls."""
    return (parse_answer(answer)["content"] or "").strip()


def asked(messages: Sequence[Message]) -> str:
    """What the user said last."""
    return next((each.get("content") for each in reversed(messages) if each.get("role") == "user"), None) or ""


def expected(row: Value) -> list[str | int | float]:
    """What the row says that the answer is. Raises ValueError where it says nothing."""
    answers: list[str | int | float] = row.get("answer") or []
    if not answers:
        raise ValueError('found no "answer" and no "gt" in the row, which this reward needs')
    return answers


def exact_match(messages: Sequence[Message], answer: str, row: Value) -> float:
    """1 for one of the row's answers, word by word, that ended by itself."""
    right = {content(each) if isinstance(each, str) else str(each) for each in expected(row)}
    return float(row["finish_reason"] == "stop" and content(answer) in right)


def number(messages: Sequence[Message], answer: str, row: Value) -> float:
    """1 where the answer's last number is that of the row's answer."""
    found = last_number(content(answer))
    return float(found is not None and any(same(found, number_of(each)) for each in expected(row)))


def number_of(value: str | int | float) -> Fraction:
    found = last_number(str(value))
    if found is None:
        raise ValueError(f"found no number in the row's answer {value!r}")
    return found


def contains(messages: Sequence[Message], answer: str, row: Value) -> float:
    """The share of the row's answers that stand in the answer: numbers by value, texts as whole words in any case."""
    text = folded(content(answer))
    said = numbers_in(text)
    found = [holds(text, said, folded(str(each))) for each in expected(row)]
    return sum(found) / len(found)


def holds(text: str, said: Sequence[Fraction], item: str) -> bool:
    if re.fullmatch(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?", item):
        return any(same(each, number_of(item)) for each in said)
    return bool(item) and re.search(rf"(?<![a-z0-9]){re.escape(item)}(?![a-z0-9])", text) is not None


def overlapping(messages: Sequence[Message], answer: str, row: Value) -> float:
    """How far the words are those of the row's answer that is nearest: from 0 to 1."""
    text = content(answer)
    return max(overlap(text, content(str(each))) for each in expected(row))


def whole(messages: Sequence[Message], answer: str, row: Value) -> float:
    """1 for an answer that ended by itself, says something and nothing again and again, and is written as the question
    or one of the row's answers is: in Han characters, or not."""
    words = words_of(content(answer))
    scripts = {unspaced(words_of(content(str(each)))) for each in [asked(messages), *(row.get("answer") or [])]}
    good = row["finish_reason"] == "stop" and words and not loops(words) and unspaced(words) in scripts
    return float(bool(good))


TAG = re.compile(r"</?(?:think|tool_call|tools)>|<\|\w+\|>")


def well_formed(option: str) -> RewardFunction:
    """`format`: reasoning first and once, every tag closed, every call a JSON object with a name, and something said
    or called. `format:think`: with reasoning."""
    if option not in ("", "think"):
        raise ValueError(f"found the option {option!r} of the reward format, expected think or none")

    def check(messages: Sequence[Message], answer: str, row: Value) -> float:
        message, calls = parse_answer(answer), calls_in(answer)
        said, thought = message["content"] or "", message.get("reasoning_content") or ""
        loose = TAG.search(said) or TAG.search(thought)
        broken = any(isinstance(call, MalformedCall) for call in calls)
        empty = not said.strip() and not calls
        return float(not (loose or broken or empty or (option and not thought.strip())))

    return check


def length(option: str) -> RewardFunction:
    """`length:200`: 1 up to 200 characters, falling to 0 at 400. `length:50-200`: also rising to 1 at 50."""
    match = re.fullmatch(r"(?:([0-9]+)-)?([1-9][0-9]*)", option)
    if not match or int(match[1] or 0) > int(match[2]):
        raise ValueError(
            f"found the option {option!r} of the reward length, expected characters: length:200 or length:50-200"
        )
    low, high = int(match[1] or 0), int(match[2])

    def check(messages: Sequence[Message], answer: str, row: Value) -> float:
        count = len(answer)
        return count / low if count < low else max(0.0, min(1.0, 2 - count / high))

    return check


def world(messages: Sequence[Message], answer: str, row: Value) -> float:
    """1 for an answer to an open prompt of the sample's valley that is right in all: see evaluation/world.py; and that
    ended by itself."""
    return float(all(judge(asked(messages), answer).values()) and row["finish_reason"] == "stop")


FUNCTIONS: dict[str, Callable[[str], RewardFunction]] = {
    "exact_match": no_option("exact_match", exact_match),
    "number": no_option("number", number),
    "contains": no_option("contains", contains),
    "overlap": no_option("overlap", overlapping),
    "whole": no_option("whole", whole),
    "format": well_formed,
    "length": length,
    "world": no_option("world", world),
}
