"""Several processes, each with the whole model: gradients are summed over the ranks, once an update.

DDP averages over ranks; the loss is multiplied by their number before, so what arrives is the sum over ranks divided by
the update's global weight, the very gradient one process would have.
"""

import contextlib

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.engines.single import SingleEngine


class DDPEngine(SingleEngine):
    name = "ddp"

    def wrap(self) -> nn.Module:
        super().wrap()
        self.gradient_scale = float(self.world.size)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.network.no_sync()  # type: ignore[operator,union-attr]
