"""A split model's gradients are one process's, a parameter at a time.

Losses cannot tell: Adam divides a gradient by its own size, so a wrong scale, of all parameters or of some, hides.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import ROOT, all_cores, environment
from tests.invariant.split import OPTIONS, PROBLEMS, SPLITS, UPDATES, Learnt, file_of, learn_alone, problem_of
from training import PretrainConfig
from training.split import ZERO_BUBBLE, check_flags

TWICE = "one micro-batch twice"
PLAIN = (TWICE, "compiled", "dropout")  # which are plain but for that
Meeting = tuple[str, str]  # split, problem
EVERY_RUN: list[Meeting] = [
    ("tp2", "untied, qk-norm, checkpointing"), ("tp2", "lora"), ("tp2", "reward"), ("tp2", "dropout"),
    ("tp2", "float16"), ("tp2", "compiled"),
    ("pp2 gpipe", "reward"), ("pp2 1f1b", "dpo"), ("pp2 1f1b", "float16"), ("pp2 interleaved", "bottleneck"),
    ("pp2 zb", "prefix"), ("pp2 zbv", "plain"), ("pp2 zbv", "bfloat16"), ("pp2 1f1b, fsdp", "lora"),
    ("tp2 x fsdp2", "plain"), ("pp2 x tp2", "clipped"), ("pp2 zb x ddp2", "kto, untied"),
    ("pp2 interleaved x fsdp2", "plain"), ("pp2 1f1b x ddp2", TWICE),
]  # fmt: skip
OF_EIGHT = ("plain", "untied, qk-norm, checkpointing", "reward", "lora", "bottleneck")  # ranks: they take their time


def drills() -> Iterator[Meeting]:
    for name, split in SPLITS.items():
        for problem, asked in (PROBLEMS | OPTIONS).items():
            if problem != TWICE and split.takes(asked) and (split.ranks < 8 or problem in OF_EIGHT):
                yield name, problem


# Differences ----------------------------------------------------------------------------------------------------------


class Differences(NamedTuple):
    """Between a split model and one process, the largest of all updates and ranks, as a share of the latter's."""

    losses: float
    norms: float  # of gradients, before clipping
    gradients: float  # of a parameter: the norm of the difference by the norm
    held_out: float
    weights: float  # likewise
    where: str  # the gradient


@cache
def alone(problem: str, n_layers: int) -> Learnt:
    like = "plain" if problem in PLAIN else problem.removesuffix(", dropout")
    return learn_alone(problem_of(like, n_layers))


def learnt_by(folder: Path, split: str, problem: str) -> list[Learnt]:
    """What the ranks have learnt; of what several have, all have the same."""
    found = [Learnt(*torch.load(file_of(folder, split, problem, rank))) for rank in range(SPLITS[split].ranks)]
    copies: dict[str, Tensor] = {}
    for rank in found:
        for name, part in rank.copies.items():
            assert torch.equal(part, copies.setdefault(name, part)), name
    return found


def share(found: Tensor | float, expected: Tensor | float) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    off = float((found - expected).norm() / expected.norm())
    return math.inf if math.isnan(off) else off


def differences(folder: Path, split: str, problem: str) -> Differences:
    expected, found = alone(problem, SPLITS[split].n_layers), learnt_by(folder, split, problem)
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


def learns_as_one_process(folder: Path, split: str, problem: str) -> None:
    if "dropout" in problem:
        return drops_out(folder, split, problem)
    if problem in ("bfloat16", "float16"):
        return rounds(folder, split, problem)
    off = differences(folder, split, problem)
    assert off.gradients < 1e-5 and off.norms < 1e-6, off
    assert off.losses < 1e-5 and off.held_out < 1e-5 and off.weights < 1e-5, off


def drops_out(folder: Path, split: str, problem: str) -> None:
    """Ranks draw other numbers than one process, and agree on what they have in common."""
    expected = alone(problem, SPLITS[split].n_layers)
    for rank in learnt_by(folder, split, problem):
        assert rank.losses != expected.losses and rank.losses == pytest.approx(expected.losses, rel=0.05)
        assert all(math.isfinite(norm) for norm in rank.norms)


def rounds(folder: Path, split: str, problem: str) -> None:
    """A gradient that overflows on one rank makes all skip the update, and scale their losses down."""
    expected = alone(problem, SPLITS[split].n_layers)
    sixteen = problem == "float16"
    assert [math.isfinite(norm) for norm in expected.norms] == [True, not sixteen, True]
    assert expected.scales == ([2.0**16, 2.0**16, 2.0**15] if sixteen else [1.0] * UPDATES)
    for rank in learnt_by(folder, split, problem):
        assert rank.losses == pytest.approx(expected.losses, rel=5e-3) and rank.scales == expected.scales
        assert [math.isfinite(norm) for norm in rank.norms] == [math.isfinite(norm) for norm in expected.norms]
        for name, weight in rank.weights.items():  # an update more moves them by 2e-3
            assert share(weight, expected.weights[name]) < 1e-3, name


# Tests ----------------------------------------------------------------------------------------------------------------


def learn_spread(folder: Path, meetings: Sequence[Meeting], seconds: float = 1200) -> Path:
    command = [sys.executable, ROOT / "tests/invariant/split.py", folder, json.dumps(meetings)]
    with all_cores():
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn_spread(tmp_path_factory.mktemp("split"), EVERY_RUN)


@pytest.mark.parametrize(("split", "problem"), [each for each in EVERY_RUN if each[1] != TWICE])
def test_a_split_model_learns_what_one_process_learns(spread: Path, split: str, problem: str) -> None:
    learns_as_one_process(spread, split, problem)


def test_a_micro_batch_that_counts_twice_is_seen(spread: Path) -> None:
    """And not by losses, which after three updates are those of a model that learns as it should, nearly."""
    off = differences(spread, "pp2 1f1b x ddp2", TWICE)
    assert off.losses < 1e-4 and off.norms > 0.1 and off.gradients > 0.1


@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
def test_a_compiled_block_is_not_taken_apart(schedule: str) -> None:
    """Its weights would have no gradients, and losses would say nothing."""
    with pytest.raises(ValueError, match=f"--compile with --pp_schedule {schedule}"):
        check_flags(PretrainConfig(pp=2, pp_schedule=schedule, compile=True), "ddp")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Split -> what it has learnt of every problem; asked for the first time, it learns."""

    @cache
    def learnt(split: str) -> Path:
        folder = tmp_path_factory.mktemp("drill")
        return learn_spread(folder, [each for each in drills() if each[0] == split], 3000)

    return learnt


@pytest.mark.slow
@pytest.mark.parametrize(("split", "problem"), drills())
def test_every_split_of_every_problem(drilled: Callable[[str], Path], split: str, problem: str) -> None:
    learns_as_one_process(drilled(split), split, problem)
