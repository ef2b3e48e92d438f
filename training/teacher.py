"""A frozen network that a student learns from, whole on every rank, and what it says of a batch.

teacher = Teacher(config, weights, "its hash")
teacher.ask(batch, places.hidden)            Said(hidden, weight): its logits, a chunk of tokens at a time
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.batch import Batch
from model import GPT, GPTConfig
from model.attention import Layout
from model.folder import assemble


@dataclass
class TaughtBatch(Batch):
    """A micro-batch that brings along what a teacher finds likeliest at every place that learns (top_k.py).

    teacher_ids: int64 (supervised, k).
    teacher_logps: float32 (supervised, k + 1): log p of each at the temperature of training, nats, and that of all
        other tokens together.
    """

    teacher_ids: Tensor
    teacher_logps: Tensor


class Said(NamedTuple):
    """What it thinks of every place that learns."""

    hidden: Tensor  # (tokens, dim)
    weight: Tensor  # (vocabulary, dim)

    def part(self, part: slice) -> Tensor:
        """Its logits of some of the tokens, (tokens, vocabulary)."""
        return self.hidden[part] @ self.weight.T


@dataclass
class Teacher:
    """Its network is there from the first question on, and until it is let go of."""

    config: GPTConfig
    weights: Callable[[], Iterable[tuple[str, Tensor]]]  # name and full tensor of every parameter
    identity: str  # equal for equal networks
    compiled: bool = False
    network: GPT | None = field(default=None, init=False)

    @torch.no_grad()
    def ask(self, batch: Batch, like: Tensor) -> Said:
        """Of a batch that is on its device; computed in the type of `like`, where that is."""
        network = self.network or self.load(like.device, like.dtype)
        hidden = network.model(
            batch.input_ids, batch.position_ids, Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens)
        ).flatten(0, 1)
        return Said(hidden.index_select(0, batch.learnt), network.head_weight)

    def load(self, device: torch.device, dtype: torch.dtype) -> GPT:
        self.network = assemble(self.config, self.weights(), device, dtype).requires_grad_(False)
        if self.compiled:
            self.network.compile_parts()
        return self.network

    def let_go(self) -> None:
        """Its memory; a later question takes it again."""
        self.network = None
