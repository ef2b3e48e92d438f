"""Several processes, each with the whole model: gradients are summed over the ranks, once an update.

DDP averages over ranks; the loss is multiplied by their number before, so what arrives is the sum over ranks divided by
the update's global weight, the very gradient one process would have.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.engines.single import SingleEngine


class DDPEngine(SingleEngine):
    name = "ddp"

    def wrap(self) -> nn.Module:
        self.gradient_scale = float(self.world.size)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.network.no_sync()  # type: ignore[operator,union-attr]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        everywhere: list[Any] = [None] * self.world.size
        dist.all_gather_object(everywhere, value)
        return everywhere

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
