"""Several processes, each with the whole model: Horovod sums gradients over the ranks once an update (Sergeev & Del
Balso 2018, arXiv:1802.05799).

    horovodrun --gloo -np 2 python train_pretrain.py        a gradient of 1 on rank 0 and of 2 on rank 1 is 3 on both

A gradient starts its way as soon as the last micro-batch's backward pass has made it, and Horovod puts together what is
there at the same time. All else that ranks tell each other goes through torch.distributed, as in the other engines.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from training.engines.pytorch import PyTorchEngine

Horovod = Any  # the module horovod.torch; it has no types
WARNING = 60  # seconds after which Horovod says that some ranks wait for a gradient, and which ranks do not give it


def begin(limit: float) -> Horovod:
    """Start Horovod, which waits no more than so many seconds for a rank, or for a gradient that one does not give.

    Raises ValueError where it is not built for this PyTorch.
    """
    try:
        import horovod.torch as hvd
    except ImportError as missing:
        raise ValueError(
            f"--engine horovod needs Horovod, built for this PyTorch ({missing}); docs/distributed.md says how, and "
            "--engine ddp does the same without it"
        ) from None
    waits = {"STALL_CHECK_TIME": min(WARNING, limit), "STALL_SHUTDOWN_TIME": limit, "GLOO_TIMEOUT": limit}
    for wait, seconds in waits.items():
        os.environ.setdefault(f"HOROVOD_{wait}_SECONDS", str(round(seconds)))
    hvd.init()
    return hvd


class HorovodEngine(PyTorchEngine):
    name = "horovod"

    def wrap(self) -> nn.Module:
        self.horovod = begin(self.config.comm_timeout)
        self.horovod.broadcast_parameters(dict(self.model.named_parameters()), root_rank=0)
        self.travels, self.under_way = False, list[int]()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self.send, name))
        return self.model

    def send(self, name: str, parameter: Tensor) -> None:
        if self.travels:
            self.under_way.append(self.horovod.allreduce_async_(parameter.grad, name=name, op=self.horovod.Sum))

    @contextlib.contextmanager
    def communicate_if(self, last: bool) -> Iterator[None]:
        self.travels = last
        yield
        for handle in self.under_way:
            self.horovod.synchronize(handle)
        self.under_way.clear()
