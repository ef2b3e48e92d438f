"""Two networks that are learnt from the same batches, each by an engine of its own: a policy, and its critic.

engine = ActorCritic(policy, critic, critic_rate=2.0)       an Engine; what is generated and exported is the policy

The critic's learning rate is so many times the policy's. Its objective is the policy's `critic`, with the same weight.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dataset.batch import Batch
from model import GPT
from training.engines.contract import B, Engine, T, Totals
from training.objectives import PPO, Objective, Output
from training.transfer import Deferred

N = TypeVar("N")


class Both(Deferred[N]):
    """Two numbers that come later, as one."""

    def __init__(self, read: Callable[[], N]):
        self.read_both = read

    def read(self) -> N:
        return self.read_both()


class ActorCritic:
    """An Engine. What is not of both is the policy's."""

    def __init__(self, policy: Engine, critic: Engine, critic_rate: float):
        self.policy, self.critic, self.critic_rate = policy, critic, critic_rate
        self.name, self.device, self.dtype, self.world = policy.name, policy.device, policy.dtype, policy.world
        self.model: GPT = policy.model
        self.optimizers = policy.optimizers

    # --- of both ---

    def forward_backward(
        self, micro_batches: list[B], objective: Objective[B], weight: float | None = None
    ) -> Deferred[Totals]:
        assert isinstance(objective, PPO)
        acted = self.policy.forward_backward(micro_batches, objective.policy, weight)
        judged = self.critic.forward_backward(micro_batches, objective.critic, weight)
        return Both(lambda: together(acted.read(), judged.read()))

    def step(self, learning_rate: float) -> Deferred[float]:
        """The norm is that of the policy's gradient, unless the critic's is not finite."""
        acted, judged = self.policy.step(learning_rate), self.critic.step(learning_rate * self.critic_rate)
        return Both(lambda: acted.read() + 0.0 * judged.read())

    def evaluate(self, micro_batches: list[B], objective: Objective[B]) -> Totals:
        assert isinstance(objective, PPO)
        acted = self.policy.evaluate(micro_batches, objective.policy)
        return together(acted, self.critic.evaluate(micro_batches, objective.critic))

    def save(self, folder: Path, background: bool) -> Future[Any] | None:
        under_way = [
            engine.save(folder / name, background)
            for name, engine in (("policy", self.policy), ("critic", self.critic))
        ]
        written = [each for each in under_way if each is not None]
        if not written:
            return None
        pool = ThreadPoolExecutor(1, "actor-critic")
        done = pool.submit(lambda: [each.result() for each in written])
        pool.shutdown(wait=False)
        return done

    def load(self, folder: Path) -> None:
        self.policy.load(folder / "policy")
        self.critic.load(folder / "critic")

    # --- the policy's ---

    def per_place(self, batch: Batch, objective: Objective[Any] | None = None) -> Output:
        return self.policy.per_place(batch, objective)

    def generator(self) -> contextlib.AbstractContextManager[GPT]:
        return self.policy.generator()

    @property
    def scales_loss(self) -> bool:
        return self.policy.scales_loss

    def weights(self) -> dict[str, Tensor]:
        return self.policy.weights()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return self.policy.sum_over_ranks(values)

    def sum_on_host(self, values: list[float]) -> list[float]:
        return self.policy.sum_on_host(values)

    def gather(self, value: T) -> list[T]:
        return self.policy.gather(value)

    def barrier(self) -> None:
        self.policy.barrier()


def together(policy: Totals, critic: Totals) -> Totals:
    """Sums by the names of objectives.PPO. A micro-batch's loss is not finite where either is not."""
    losses = [a + b for a, b in zip(policy.losses, critic.losses, strict=True)]
    return Totals(policy.sums | {f"critic_{name}": value for name, value in critic.sums.items()}, policy.weight, losses)
