"""The benchmark's clock: sides that do the same work in turn, and a machine's matrix products; seconds and bytes out.

    turns = Turns(device, rates.measure)
    turns.start("ours", build); turns.start("theirs", build)     each built, and its first update made: timed apart
    turns.go_round(step)                                         ours, theirs, and then the machine's own rate
    turns.timed["ours"]                                          Timed(first_seconds, seconds, work, peak_mb)

A shared machine is not equally fast twice, so whatever is compared is measured in turn.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model import GPT
from model.gpt import Role
from scripts.memory import storages
from training.metrics import peak_memory_mb


class Work(NamedTuple):
    """What an update got through."""

    tokens: float  # real ones: padding is not counted
    weight: float = 0.0  # in the objective's unit


class Side(Protocol):
    def prepare(self, step: int) -> Callable[[], Work]:
        """Make update `step`'s batches, which is not timed: training makes them ahead, in a thread. Then the update."""

    def kept(self) -> Iterable[object]:
        """Tensors that stay between updates."""


@dataclass
class Timed:
    """One side's updates; the first is timed apart, with the building before it."""

    first_seconds: float
    seconds: list[float] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    peak_mb: float = 0.0  # MiB while its updates ran, without what the other sides keep


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux alone can; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


class Turns:
    """between: what is measured after each round, beside the sides."""

    def __init__(self, device: torch.device, between: Callable[[], None] = lambda: None):
        self.device, self.between = device, between
        self.sides: dict[str, Side] = {}
        self.timed: dict[str, Timed] = {}

    def start(self, name: str, build: Callable[[], Side]) -> None:
        began = time.perf_counter()
        self.sides[name] = side = build()
        wait(self.device)
        built = time.perf_counter() - began
        seconds, _ = self.time(side.prepare(0))
        self.timed[name] = Timed(built + seconds)

    def go_round(self, step: int) -> None:
        for name, side in self.sides.items():
            update = side.prepare(step)
            others = storages(t for other in self.sides.values() if other is not side for t in other.kept())
            reset_peak(self.device)
            seconds, work = self.time(update)
            timed = self.timed[name]
            timed.seconds.append(seconds)
            timed.work.append(work)
            timed.peak_mb = max(timed.peak_mb, peak_memory_mb(self.device) - sum(others.values()) / 2**20)
        self.between()

    def time(self, update: Callable[[], Work]) -> tuple[float, Work]:
        wait(self.device)
        began = time.perf_counter()
        work = update()
        wait(self.device)
        return time.perf_counter() - began, work


# The ceiling ---------------------------------------------------------------------------------------------------------


def products(model: GPT) -> Counter[tuple[int, int]]:
    """How often a token is multiplied by a matrix of (out, in) features on its way through the network, head included.

    Three products each, forward and backward, of 2 x out x in operations: 6 N together, N = sum of out x in.
    """
    roles = model.roles()
    hidden = (p for name, p in model.named_parameters() if roles[name] is Role.HIDDEN)
    return Counter((matrix.shape[0], matrix.shape[1]) for matrix in [*hidden, model.head_weight])


@dataclass
class Rates:
    """This machine's matrix-product rate, FLOP/s, as it is now: at a model's own shapes, and of 2048 x 2048 x 2048."""

    matrices: Counter[tuple[int, int]]
    tokens: int  # of a micro-batch
    device: torch.device
    dtype: torch.dtype
    own: list[float] = field(default_factory=list)
    square: list[float] = field(default_factory=list)

    def measure(self) -> None:
        seconds = sum(count * self.seconds(out, into) for (out, into), count in self.matrices.items())
        flops = sum(count * 6 * self.tokens * out * into for (out, into), count in self.matrices.items())
        self.own.append(flops / seconds)
        a, b, c = (self.random(2048, 2048) for _ in range(3))
        self.square.append(2 * 2048**3 / self.seconds_of(lambda: torch.mm(a, b, out=c)))

    def seconds(self, out: int, into: int) -> float:
        """Of the three products of one matrix: output, gradient of the input, gradient of the matrix."""
        x, w = self.random(self.tokens, into), self.random(out, into)
        y, dx, dw = self.random(self.tokens, out), torch.empty_like(x), torch.empty_like(w)
        return (
            self.seconds_of(lambda: torch.mm(x, w.T, out=y))
            + self.seconds_of(lambda: torch.mm(y, w, out=dx))
            + self.seconds_of(lambda: torch.mm(y.T, x, out=dw))
        )

    def random(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).uniform_(-1, 1)

    def seconds_of(self, product: Callable[[], Tensor], at_least: float = 0.02) -> float:
        """Of one product, timed over as many as take `at_least`; the first, which loads kernels, is left out."""
        product()
        count = 1
        while True:
            wait(self.device)
            began = time.perf_counter()
            for _ in range(count):
                product()
            wait(self.device)
            spent = time.perf_counter() - began
            if spent >= at_least:
                return spent / count
            count *= 2
