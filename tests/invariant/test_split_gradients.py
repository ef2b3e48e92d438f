"""A split model's gradients are one process's, a parameter at a time.

Losses cannot tell: Adam divides a gradient by its own size, so a wrong scale, of all parameters or of some, hides.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import ROOT, launched
from tests.invariant.split import OPTIONS, PROBLEMS, SPLITS, UPDATES, Learnt, file_of, learn_alone

TWICE = "one micro-batch twice"
Meeting = tuple[str, str]  # split, problem
EVERY_RUN: dict[int, list[Meeting]] = {
    2: [
        ("tp2", "untied, qk-norm, checkpointing"), ("tp2", "lora"), ("tp2", "reward"), ("pp2 gpipe", "reward"),
        ("pp2 1f1b", "dpo"), ("pp2 interleaved", "bottleneck"), ("pp2 zb", "prefix"), ("pp2 zbv", "plain"),
        ("pp2 1f1b, fsdp", "lora"),
    ],
    4: [
        ("tp2 x fsdp2", "plain"), ("pp2 x tp2", "clipped"), ("pp2 zb x ddp2", "kto, untied"),
        ("pp2 interleaved x fsdp2", "plain"), ("pp2 1f1b x ddp2", TWICE),
    ],
}  # fmt: skip


OF_EIGHT = ("plain", "untied, qk-norm, checkpointing", "reward", "lora", "bottleneck")  # ranks: they take their time


class Differences(NamedTuple):
    """Between a split model and one process, the largest of all updates and ranks, as a share of the latter's."""

    losses: float
    norms: float  # of gradients, before clipping
    gradients: float  # of a parameter: the norm of the difference by the norm
    held_out: float
    weights: float  # likewise
    where: str  # the gradient


@cache
def alone(problem: str) -> Learnt:
    return learn_alone((PROBLEMS | OPTIONS)["plain" if problem == TWICE else problem])


def learn_spread(folder: Path, meetings: Sequence[Meeting], ranks: int) -> Path:
    launched(ROOT / "tests/invariant/split.py", folder, json.dumps(meetings), ranks=ranks)
    return folder


def share(found: Tensor | float, expected: Tensor | float) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    off = float((found - expected).norm() / expected.norm())
    return off if off == off else torch.inf


def learnt_by(folder: Path, split: str, problem: str) -> list[Learnt]:
    """What the ranks have learnt; of what several have, all have the same."""
    found = [Learnt(*torch.load(file_of(folder, split, problem, rank))) for rank in range(SPLITS[split].ranks)]
    copies: dict[str, Tensor] = {}
    for rank in found:
        for name, part in rank.copies.items():
            assert torch.equal(part, copies.setdefault(name, part)), name
    return found


def differences(folder: Path, split: str, problem: str) -> Differences:
    expected, found = alone(problem), learnt_by(folder, split, problem)
    for update in range(UPDATES):
        held = set().union(*(rank.gradients[update] for rank in found))
        assert held == set(expected.gradients[update])
    weights = found[0].weights
    assert weights.keys() == expected.weights.keys()
    gradients = [
        (share(gradient, expected.gradients[update][name]), f"{name}, update {update}")
        for rank in found
        for update in range(UPDATES)
        for name, gradient in rank.gradients[update].items()
    ]
    return Differences(
        losses=max(share(a, b) for rank in found for a, b in zip(rank.losses, expected.losses, strict=True)),
        norms=max(share(a, b) for rank in found for a, b in zip(rank.norms, expected.norms, strict=True)),
        gradients=max(gradients)[0],
        held_out=max(share(rank.held_out, expected.held_out) for rank in found),
        weights=max(share(weights[name], tensor) for name, tensor in expected.weights.items()),
        where=max(gradients)[1],
    )


def same(off: Differences) -> bool:
    near = off.gradients < 1e-5 and off.norms < 1e-6 and off.losses < 1e-5 and off.held_out < 1e-5
    return near and off.weights < 1e-5


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    for ranks, meetings in EVERY_RUN.items():
        learn_spread(folder, meetings, ranks)
    return folder


@pytest.mark.parametrize(
    ("split", "problem"), [each for run in EVERY_RUN.values() for each in run if TWICE not in each]
)
def test_gradients_are_those_of_one_process(spread: Path, split: str, problem: str) -> None:
    off = differences(spread, split, problem)
    assert same(off), off


def test_a_micro_batch_that_counts_twice_is_seen(spread: Path) -> None:
    """And not by losses, which after three updates are those of a model that learns as it should, nearly."""
    off = differences(spread, "pp2 1f1b x ddp2", TWICE)
    assert off.losses < 1e-4 and off.norms > 0.1 and off.gradients > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_every_way_to_split(tmp_path: Path, split: str) -> None:
    how = SPLITS[split]
    wanted = OF_EIGHT if how.ranks == 8 else [name for name in PROBLEMS if name != TWICE]
    problems = [name for name in wanted if how.takes(PROBLEMS[name])]
    learn_spread(tmp_path, [(split, problem) for problem in problems], how.ranks)
    off = {problem: differences(tmp_path, split, problem) for problem in problems}
    assert {problem: each for problem, each in off.items() if not same(each)} == {}
