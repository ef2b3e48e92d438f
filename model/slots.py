"""Sequences that come and go at any step, in a cache of a fixed size: what a server decodes with.

    slots = Slots(model, slots=16, context=512)
    logits, cached = slots.join([1, 5, 71, 8, 6])      (vocabulary,), 0: what follows this prompt
    slots.step([40])                                   (1, vocabulary): what follows it and token 40
    logits, cached = slots.join([1, 5, 71, 8, 6, 40, 8, 5, 90])      the second row; six tokens are not computed again
    slots.step([12, 7])                                (2, vocabulary)
    slots.leave(0)                                     what was the last row is row 0 now

The rows in use are the cache's first ones (model/decode.py). A sequence that leaves stays readable behind them until
its row is needed, so that the next turn of a conversation finds the one before, and prompts that begin alike share
what they begin with. On a CPU a sequence's numbers do not depend on which others are there: matrix products give
the same row whatever the number of rows, and attention adds up in windows of one length.
"""

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from model.config import check_writes
from model.decode import CachedGPT
from model.gpt import GPT


class Slots:
    """At most `slots` sequences of at most `context` tokens each. Raises ValueError for a model that writes no text."""

    def __init__(self, model: GPT, slots: int, context: int) -> None:
        check_writes(model.config)
        self.network = CachedGPT(model, slots, context, static=False)
        self.held: list[list[int]] = [[] for _ in range(slots)]  # tokens in each row of the cache
        self.left = [-1] * slots  # when each row was last given up
        self.clock = count()

    @property
    def active(self) -> int:
        """Sequences there are; theirs are the first rows."""
        return len(self.network.lengths)

    @property
    def free(self) -> int:
        return len(self.held) - self.active

    @property
    def cache_bytes(self) -> int:
        return self.network.cache.nbytes

    def join(self, prompt: Sequence[int]) -> tuple[Tensor, int]:
        """Read a prompt into the next row, of which one must be free: logits of what follows it, (vocabulary,), and how
        many of its tokens were in the cache."""
        row, cached = self.place(prompt)
        self.exchange(row, self.active)
        row = self.active
        self.held[row] = list(prompt)
        return self.network.add([prompt[cached:]], [cached])[0], cached

    def step(self, ids: Sequence[int]) -> Tensor:
        """Take in the next token of every sequence: logits of what follows, (active, vocabulary)."""
        for held, token in zip(self.held, ids, strict=False):
            held.append(token)
        return self.network.step(torch.tensor(ids))

    def leave(self, row: int) -> None:
        """End a sequence; the last one gets its row."""
        self.exchange(row, self.active - 1)
        self.network.leave(row)
        self.left[self.active] = next(self.clock)

    def place(self, prompt: Sequence[int]) -> tuple[int, int]:
        """A free row that holds as much of a prompt's beginning as any row does, and how many tokens that is."""
        shared = [common_length(held, prompt[:-1]) for held in self.held]  # what follows the last is to be computed
        source = max(range(len(shared)), key=lambda row: (shared[row], self.left[row]))
        cached, oldest = shared[source], min(range(self.active, len(shared)), key=self.left.__getitem__)
        # a conversation goes on where it is; what shares only a beginning gets a copy, and leaves the rest as it is
        if source >= self.active and 2 * cached >= len(self.held[source]):
            return source, cached
        if source != oldest and cached:
            self.network.copy(source, oldest, cached)
            self.held[oldest] = list(prompt[:cached])
        return oldest, cached

    def exchange(self, one: int, other: int) -> None:
        """Let two rows change places."""
        if one == other:
            return
        self.network.swap(one, other, max(len(self.held[one]), len(self.held[other])))
        self.held[one], self.held[other] = self.held[other], self.held[one]
        self.left[one], self.left[other] = self.left[other], self.left[one]


def cache_bytes(model: GPT, slots: int, context: int) -> int:
    """What the cache of so many slots takes."""
    config, size = model.config, model.head_weight.dtype.itemsize
    assert config.head_dim is not None
    if model.head_weight.device.type == "cpu":
        size = max(size, 4)  # as model/decode.py keeps it
    tokens = slots * (context + model.model.prefix_length)
    return 2 * config.n_layers * tokens * config.n_kv_heads * config.head_dim * size


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
