"""Several processes, each with the whole model: gradients travel between the ranks once an update.

DDP averages over ranks; the loss is multiplied by their number before, so what arrives is the sum over ranks divided by
the update's global weight, the very gradient one process would have.
"""

import contextlib

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.engines.pytorch import PyTorchEngine

BUCKETS = 12
LEAST, MOST = 1.0, 25.0  # MiB; below, a message costs more to start than to send; the upper one is DDP's own size


def bucket_size(model: nn.Module) -> float | None:
    """MiB of gradients that travel together; None: DDP's own, for a model large enough to fill many of those.

    A bucket travels when all of it is there, beside the backward pass of what comes after; so the gradients of a small
    model go in several too. The last has nothing left to hide behind: it holds the embedding, and smaller buckets keep
    little else with it. The default model's 98.5 MiB go in 9 buckets, of 15 MiB the last.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in learnt) / 2**20
    return max(LEAST, size / BUCKETS) if size < BUCKETS * MOST else None


class DDPEngine(PyTorchEngine):
    name = "ddp"
    averages = True
    network: DistributedDataParallel

    def wrap(self) -> DistributedDataParallel:
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model,
            device_ids=devices,
            gradient_as_bucket_view=True,
            process_group=self.data_group,
            bucket_cap_mb=bucket_size(self.model),
        )

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.network.no_sync()
