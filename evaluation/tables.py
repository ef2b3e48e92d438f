"""Scores as people read them: tables for the terminal. Intervals hold 95 %.

task       kind     items   accuracy               by length              chance   perplexity
arc_easy   choice   2,139   31.2% (29.3 to 33.2)   30.1% (28.2 to 32.1)   25.0%
lambada    cloze      793   4.2% (3.0 to 5.8)                              0.0%         212.4
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from evaluation.benchmark import Run, Score
from evaluation.comparison import Comparison, Difference
from evaluation.scoring import Result


def of_files(results: Sequence[Result]) -> Table:
    """What `score_file` measured: one column a file, one line a number."""
    table = Table("", *(Path(result["file"]).name for result in results))
    for column in table.columns[1:]:
        column.justify = "right"
    names = dict.fromkeys(name for result in results for name in result if name != "file")
    for name in names:
        table.add_row(name.replace("_", " "), *(shown(result.get(name)) for result in results))
    return table


def shown(value: object) -> str:
    if isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values()):
        return "\n".join(
            f"{kind}: {each['accuracy']:.1%} of {each['pairs']} "
            f"({each['accuracy_low']:.1%} to {each['accuracy_high']:.1%})"
            for kind, each in value.items()
        )
    if isinstance(value, dict):
        return "\n".join(f"{count:,} {reason}" for reason, count in value.items()) or "0"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")


# Benchmarks -----------------------------------------------------------------------------------------------------------


def described(run: Run) -> str:
    """How items were asked, in a line."""
    chat, shots = run.how["chat"], run.how["shots"]
    form = "questions through the chat template, texts to go on with as they are" if chat else "as plain text"
    return f"asked: {form}; {shots or 'no'} example{'s' * (shots != 1)} before each; with 95 % intervals"


def of_benchmark(run: Run, subjects: bool) -> list[Table | str]:
    """Of tasks, of languages where there are several, and of subjects where they are asked for; how they were asked,
    and what became of items that were cut or left out."""
    groups = {group: [each for each in run.scores if each.group == group] for group in ("task", "lang", "subject")}
    if len({each.name for each in groups["lang"]}) < 2:
        groups["lang"] = []
    if not subjects:
        groups["subject"] = []
    counts = [f"{count:,} items: {what}" for what, count in run.counts.items()]
    lines = [described(run), *counts, *run.notes]
    return [*(of_scores(group, scores) for group, scores in groups.items() if scores), *lines]


def of_scores(group: str, scores: Sequence[Score]) -> Table:
    table = Table(group.replace("lang", "language"), "kind", "items", "accuracy", "by length", "chance", "perplexity")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for each in scores:
        table.add_row(
            each.name, each.kind, f"{each.items:,}", share(each.accuracy, each.low, each.high),
            share(each.accuracy_by_length, each.low_by_length, each.high_by_length), f"{each.chance:.1%}",
            "" if each.perplexity is None else f"{each.perplexity:,.1f}",
        )  # fmt: skip
    return table


def share(value: float | None, low: float | None, high: float | None) -> str:
    """share(0.312, 0.293, 0.332) -> "31.2% (29.3 to 33.2)" """
    if value is None or low is None or high is None:
        return ""
    return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


# Comparisons ----------------------------------------------------------------------------------------------------------


def of_differences(differences: Sequence[Difference]) -> Table:
    """Points by which b is better than a; a star where the interval leaves out 0."""
    table = Table("task", "judged by", "items", "a", "b", "b - a, points", "p", "chance")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for each in differences:
        clear = " *" if each.low > 0 or each.high < 0 else ""
        table.add_row(
            each.name, f"{each.kind}, by length" if each.by_length else each.kind, f"{each.items:,}", f"{each.a:.1%}",
            f"{each.b:.1%}", f"{100 * each.difference:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f}){clear}",
            f"{each.p:.3f}", f"{each.chance:.1%}",
        )  # fmt: skip
    return table


def of_comparison(found: Comparison) -> list[Table | str]:
    """Differences, then answers."""
    lines = [f"{letter}: {name}" for letter, name in zip("ab", found.models, strict=True)]
    lines += [f"{letter} {described(run)}" for letter, run in zip("ab", found.runs, strict=False)]
    made = [of_differences(found.differences)] if found.differences else []
    return [*made, *([of_answers(found)] if found.answers else []), *lines, *found.notes]


def of_answers(comparison: Comparison) -> Table:
    """Both models' answers to every prompt, side by side."""
    table = Table("prompt", "a", "b", show_lines=True)
    for column, ratio in zip(table.columns, (1, 2, 2), strict=True):
        column.ratio, column.overflow = ratio, "fold"
    for each in comparison.answers:
        table.add_row(*(Text(each[name]) for name in ("prompt", "a", "b")))
    return table
