"""What the loop may ask of an engine, whichever it is. Every rank calls every method at the same time.

    totals = engine.forward_backward(micro_batches, objective, weight)     sums over all micro-batches and data ranks
    norm = engine.step(learning_rate)
    totals.read().sums["loss"], norm.read()                                waits for the device, and the others do not

An engine owns the model, the optimizers and the order in which micro-batches meet the network; the objective sees only
what the network said.
"""

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from dataset.batch import Batch
from model import GPT
from training.distributed import World
from training.objectives import Objective, Output
from training.transfer import Deferred

Weights = Callable[[], Iterable[tuple[str, Tensor]]]  # name and full float32 tensor of every parameter, at every call
T = TypeVar("T")
B = TypeVar("B", bound=Batch)


class Machine(NamedTuple):
    """Where this process runs."""

    world: World
    device: torch.device
    dtype: torch.dtype


class Totals(NamedTuple):
    """What came of an update's (or a validation's) micro-batches."""

    sums: dict[str, float]  # the objective's, over all micro-batches and data ranks
    weight: float  # likewise; a mean is a sum divided by it
    losses: list[float]  # of this rank's micro-batches, to name the rows of one that is not finite


class Peers(Protocol):
    """What ranks tell each other."""

    world: World

    def sum_over_ranks(self, values: list[float]) -> list[float]: ...

    def sum_on_host(self, values: list[float]) -> list[float]:
        """The same, beside whatever the devices do. The first call is the main thread's; one thread at a time."""

    def gather(self, value: T) -> list[T]:
        """Any picklable value of every rank."""

    def barrier(self) -> None: ...


class Engine(Peers, Protocol):
    name: str
    device: torch.device
    dtype: torch.dtype
    model: GPT  # its config and parameters; a sharded one cannot be called
    optimizers: list[Optimizer]

    def forward_backward(
        self, micro_batches: list[B], objective: Objective[B], weight: float | None = None
    ) -> Deferred[Totals]:
        """Accumulate the gradient of sum(loss) / sum(weight), both over all micro-batches and data ranks.

        Who knows the weight by then gives it; without, ranks sum it here, and wait for that.
        """

    def step(self, learning_rate: float) -> Deferred[float]:
        """Clip, update, clear. Returns the gradient's norm before clipping; a non-finite one skips the update, so that
        weights, moments and counts stay as they were."""

    def evaluate(self, micro_batches: list[B], objective: Objective[B]) -> Totals:
        """The objective's sums over these micro-batches and all data ranks, without gradients."""

    def per_place(self, batch: Batch, objective: Objective[Any] | None = None) -> Output:
        """What the network says of this rank's batch, without gradients, dropout or sums: log-probabilities, or what an
        objective asks for."""

    def generator(self) -> contextlib.AbstractContextManager[GPT]:
        """A network to generate with, on every rank: the whole one, or a copy gathered for as long as this lasts."""

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler looks for its scale, which takes a few updates that are not finite."""

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU, by Hugging Face name; on rank 0 alone. Of those that are learnt: all, or
        an adapter's."""

    def save(self, folder: Path, background: bool) -> Future[Any] | None:
        """Write the state of what is learnt from all ranks side by side. In the background: a copy is taken now,
        the Future ends with the write."""

    def load(self, folder: Path) -> None:
        """The inverse of `save`, from any number of ranks and any engine."""
