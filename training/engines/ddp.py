"""Several processes, each with the whole model: gradients travel between the ranks once an update.

DDP averages over ranks; the loss is multiplied by their number before, so what arrives is the sum over ranks divided by
the update's global weight, the very gradient one process would have.
"""

import contextlib

from torch.nn.parallel import DistributedDataParallel

from training.engines.pytorch import PyTorchEngine


class DDPEngine(PyTorchEngine):
    name = "ddp"
    averages = True
    network: DistributedDataParallel

    def wrap(self) -> DistributedDataParallel:
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model, device_ids=devices, gradient_as_bucket_view=True, process_group=self.data_group
        )

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.network.no_sync()
