"""What passes between the host and the device while training runs, so that neither waits for the other.

norm = Deferred(tensor, lambda numbers: numbers[0])      the copy to the host is queued; returns at once
norm.read()                                              0.731, once the device has come so far
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from training.distributed import SILENCE

T_co = TypeVar("T_co", covariant=True)


class Deferred(Generic[T_co]):
    """Numbers on their way from the device to the host; reading them waits until they are there.

    To read at once would empty the device's queue, and leave it idle until the host has filled it again. Whoever reads
    when the next update is queued waits for what is over, or nearly.
    """

    def __init__(self, numbers: Tensor, meaning: Callable[[list[float]], T_co]):
        """numbers: (n,), never written to again. `meaning` makes of them, as floats, what `read` returns."""
        self.meaning, self.queued = meaning, time.monotonic()
        numbers = numbers.detach()
        if not numbers.is_cuda:
            self.numbers, self.there = numbers, None
            return
        self.numbers = numbers.to("cpu", non_blocking=True)  # pinned memory, which torch takes for such a copy
        self.there = torch.cuda.Event()
        self.there.record()

    def read(self) -> T_co:
        if self.there is not None:
            self.there.synchronize()
            SILENCE.hear(self.queued)
        return self.meaning(self.numbers.tolist())
