"""How well scores tell pairs apart, and whether they know how well: margins of pairs in, numbers and a picture out.

    told_apart(tensor([2.1, 0.3, -0.4]))
    -> {"accuracy": 0.667, "accuracy_low": 0.208, "accuracy_high": 0.939, "margin": 0.667, "calibration_error": ...}

A margin is score(chosen) - score(rejected). Under Bradley and Terry's model sigmoid(margin) is the probability that the
chosen answer is preferred. A score that knows how often it is right says 0.9 where it gets nine pairs in ten right.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = 10  # of pairs, equally many, by what is predicted
Z = 1.959964  # standard errors to either side that hold 95 %


class Group(NamedTuple):
    """Pairs of about one predicted probability."""

    predicted: float  # mean probability of the answer that has the larger score
    right: int
    pairs: int


def interval(right: float, pairs: int) -> tuple[float, float]:
    """Of a share, where its true value lies with 95 %: Wilson's (1927). It stays within [0, 1] at every share."""
    share, spread = right / pairs, Z**2 / pairs
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def told_apart(margins: Tensor) -> dict[str, float]:
    """float (pairs,) -> accuracy with its interval, mean margin, and the mean distance of what is predicted from what
    is found, over groups of pairs (expected calibration error: Naeini et al. 2015, with groups of one size)."""
    right, pairs = int((margins > 0).sum()), len(margins)
    low, high = interval(right, pairs)
    error = sum(each.pairs * abs(each.predicted - each.right / each.pairs) for each in groups(margins)) / pairs
    return {
        "accuracy": right / pairs,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float(margins.mean()),
        "calibration_error": error,
    }


def by_kind(margins: Tensor, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Kind of pair -> `told_apart` of its pairs, and how many there are."""
    return {kind: {"pairs": len(own), **told_apart(own)} for kind, own in of_kinds(margins, kinds).items()}


def of_kinds(margins: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Kind of pair -> the margins of its pairs, by name."""
    return {kind: margins[[each == kind for each in kinds]] for kind in sorted(set(kinds))}


def groups(margins: Tensor) -> list[Group]:
    """Pairs by how sure the score is of them, the least sure first."""
    ordered = margins[margins.abs().argsort()]
    parts = ordered.tensor_split(min(GROUPS, len(ordered)))
    return [Group(float(part.abs().sigmoid().mean()), int((part > 0).sum()), len(part)) for part in parts]


def draw(margins: Tensor, kinds: Sequence[str], path: Path, title: str) -> None:
    """A picture: what is predicted against what is found, and accuracy by kind of pair, with 95 % intervals."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may look for a screen

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = groups(margins)
    left.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1)
    bars(left, [each.predicted for each in found], [(each.right, each.pairs) for each in found])
    left.set(xlabel="predicted probability", ylabel="share that is right", xlim=(0.48, 1.02), ylim=(-0.03, 1.03))
    of_kind = of_kinds(margins, kinds)
    counts = [(int((each > 0).sum()), len(each)) for each in of_kind.values()]
    bars(right, list(range(len(of_kind))), counts)
    right.axhline(0.5, color="0.7", linewidth=1)
    right.set_xticks(range(len(of_kind)), [f"{kind}\n{len(each)}" for kind, each in of_kind.items()], fontsize=8)
    right.set(ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(-0.5, len(of_kind) - 0.5))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def bars(axes: "Axes", places: Sequence[float], counts: Sequence[tuple[int, int]]) -> None:
    """Shares (right, of how many) with their intervals."""
    shares = torch.tensor([right / pairs for right, pairs in counts])
    ends = torch.tensor([interval(right, pairs) for right, pairs in counts])
    spread = torch.stack((shares - ends[:, 0], ends[:, 1] - shares)).clamp(min=0)
    axes.errorbar(places, shares.numpy(), yerr=spread.numpy(), fmt="o", markersize=4, capsize=2)
