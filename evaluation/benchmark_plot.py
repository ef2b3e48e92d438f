"""A picture of a benchmark: a bar for every task with its 95 % interval, and a line where chance is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evaluation.benchmark import Run, Score


def draw(runs: "Sequence[Run]", path: Path) -> None:
    """A bar for each run's accuracy on every task with its interval, beside it what it is by length, and a line where
    chance is. Tasks that one run alone has are left out of a picture of several."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may look for a screen

    found = [{each.name: each for each in run.scores if each.group == "task"} for run in runs]
    names = [name for name in found[0] if all(name in scores for scores in found)]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(names) * (len(runs) + 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (run, scores) in enumerate(zip(runs, found, strict=True)):
        bars(axes, [scores[name] for name in names], i, len(runs), f"accuracy{f', {short(run)}' * (len(runs) > 1)}")
    places = range(len(names))
    axes.vlines(
        [100 * found[0][name].chance for name in names], [each - 0.45 for each in places],
        [each + 0.45 for each in places], color="tab:red", linewidth=1.5, label="chance",
    )  # fmt: skip
    axes.set_yticks(places, [f"{name} ({found[0][name].items:,})" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="right, %, with 95 % interval", xlim=(0, None), title=" and ".join(map(short, runs)))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def short(run: "Run") -> str:
    """A folder's own name."""
    return Path(run.model).name


def bars(axes: "Axes", scores: "Sequence[Score]", number: int, of: int, label: str) -> None:
    """One run's bars, the number-th `of` so many at every task."""
    height, shares = 0.8 / of, [100 * each.accuracy for each in scores]
    places = [i - 0.4 + height * (number + 0.5) for i in range(len(scores))]
    ends = [
        [100 * (each.accuracy - each.low) for each in scores],
        [100 * (each.high - each.accuracy) for each in scores],
    ]
    color = f"C{9 if number else 0}"
    axes.barh(
        places, shares, 0.9 * height, xerr=ends, color=color, alpha=0.7, label=label, capsize=2,
        error_kw={"linewidth": 1, "ecolor": "0.3"},
    )  # fmt: skip
    choices = [(place, each) for place, each in zip(places, scores, strict=True) if each.accuracy_by_length is not None]
    axes.plot(
        [100 * (each.accuracy_by_length or 0.0) for _, each in choices], [place for place, _ in choices], "D",
        color="black", markersize=3, label="by length" if number == of - 1 else None,
    )  # fmt: skip
