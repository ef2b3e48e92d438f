"""What passes between the host and the device while training runs, so that neither waits for the other.

    sent = Transfer(device).send(micro_batches)              in a thread, while the update before is learnt
    sent.arrived()                                           the micro-batches, on the device

    norm = Deferred(tensor, lambda numbers: numbers[0])      the copy to the host is queued; returns at once
    norm.read()                                              0.731, once the device has come so far

On a CPU there is nothing to wait for, and nothing is copied.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dataset.batch import Batch
from training.distributed import SILENCE

T_co = TypeVar("T_co", covariant=True)
B_co = TypeVar("B_co", bound=Batch, covariant=True)
B = TypeVar("B", bound=Batch)
ALIGNED = 8  # bytes; no type of a tensor needs more


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


class Sent(Generic[B_co]):
    """Micro-batches on their way to the device."""

    def __init__(self, micro_batches: list[B_co], there: torch.cuda.Event | None = None):
        self.micro_batches, self.there = micro_batches, there

    def arrived(self) -> list[B_co]:
        """Of what is queued from here on, nothing begins before they are there; the host does not wait."""
        if self.there is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.there)
            for batch in self.micro_batches:
                for tensor in tensors_of(batch).values():
                    tensor.record_stream(stream)  # its memory was taken for the other stream, which would reuse it
        return self.micro_batches


class Transfer:
    """Takes updates to a CUDA device beside its work, all tensors of an update in one copy from pinned memory. Where
    there is nothing to gain, on a CPU, what comes back are the very tensors."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, micro_batches: list[B]) -> Sent[B]:
        if self.stream is None:
            return Sent(micro_batches)
        with torch.cuda.stream(self.stream):  # and its device: a new thread would begin with the first one's
            named = [tensors_of(batch) for batch in micro_batches]
            flat, places = pack([tensor for tensors in named for tensor in tensors.values()], pinned=True)
            moved = iter(unpack(flat.to(self.device, non_blocking=True), places))
            on_device = []
            for batch, tensors in zip(micro_batches, named, strict=True):
                fields: dict[str, Any] = {name: next(moved) for name in tensors}
                on_device.append(replace(batch, **fields))
            return Sent(on_device, self.stream.record_event())


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Its fields that are tensors, by name."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


class Place(NamedTuple):
    """Of one tensor in a buffer of bytes."""

    start: int
    end: int
    carried: torch.dtype
    dtype: torch.dtype
    shape: torch.Size


def pack(tensors: list[Tensor], pinned: bool = False) -> tuple[Tensor, list[Place]]:
    """All tensors in one buffer of bytes, uint8 (n,), one after another; int64 goes as int32, half the bytes.

    Raises ValueError for a number that int32 does not hold.
    """
    carried, places, end = [], [], 0
    for tensor in tensors:
        values = tensor.flatten()
        if tensor.dtype == torch.int64:
            values = narrowed(values)
        carried.append(values.view(torch.uint8))
        start = -(-end // ALIGNED) * ALIGNED
        end = start + len(carried[-1])
        places.append(Place(start, end, values.dtype, tensor.dtype, tensor.shape))
    flat = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for values, place in zip(carried, places, strict=True):
        flat[place.start : place.end] = values
    return flat, places


def narrowed(values: Tensor) -> Tensor:
    info = torch.iinfo(torch.int32)
    if len(values) and not (info.min <= int(values.min()) and int(values.max()) <= info.max):
        raise ValueError(
            f"a batch holds {int(values.min())} to {int(values.max())}; expected numbers that int32 holds, as which "
            "they are sent to the device: give the field another type"
        )
    return values.int()


def unpack(flat: Tensor, places: list[Place]) -> list[Tensor]:
    """The inverse of `pack`, where the buffer is."""
    return [flat[place.start : place.end].view(place.carried).view(place.shape).to(place.dtype) for place in places]
