"""Several processes, each with a part of every parameter, gradient and optimizer state (PyTorch's fully_shard, FSDP2).

A block's parameters are gathered for its forward and its backward pass and dropped after; gradients are summed and cut
up in one go (ZeRO stage 3: Rajbhandari et al. 2020, arXiv:1910.02054). The model starts on the meta device and each
rank fills in its own part, so no process ever holds it whole. With --hsdp a node holds one whole copy among its
processes.
"""

import contextlib
from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from model import GPT
from model.folder import assemble
from training.distributed import TENSOR
from training.engines.contract import Weights
from training.engines.pytorch import PyTorchEngine, fill
from training.engines.tensor_parallel import split_tensors

MEMORY_FOR_GATHERED = 1 / 8  # of a GPU's


def other_dimension(parameter: nn.Parameter) -> Shard:
    """The dimension that data ranks cut: the first, or the other one of a matrix whose rows tensor ranks have cut."""
    cut = isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0)
    return Shard(1 if cut else 0)


class FSDPEngine(PyTorchEngine):
    name = "fsdp"
    averages = True  # reduce-scatter averages over ranks, as DDP does

    @cached_property
    def keeps(self) -> bool:
        """Whether parameters, once gathered, stay until the update is over: one gather an update, where else there are
        two a micro-batch. They cost a whole copy in the precision that blocks compute in."""
        if self.config.fsdp_reshard is not None:
            return not self.config.fsdp_reshard
        if self.device.type != "cuda":
            return False
        with torch.device("meta"):
            copy = GPT(self.model.config).num_parameters() * self.dtype.itemsize / self.world.model_size
        return copy <= torch.cuda.get_device_properties(self.device).total_memory * MEMORY_FOR_GATHERED

    def place(self, model: GPT, weights: Weights) -> GPT:
        model = model.to("meta")
        if self.world.tp > 1:
            split_tensors(model, self.mesh[TENSOR])
        offload = self.config.offload == "cpu"
        shard = partial(
            fully_shard,
            mesh=self.parts(),
            shard_placement_fn=other_dimension,
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy(),
        )
        # blocks travel in the lower precision; their gradients are summed in float32. Embedding, last norm and head
        # stay in float32 until autocast takes them, so that what flows between blocks is the same as without sharding.
        half = None if self.dtype == torch.float32 else self.dtype
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks():
            shard(block, mp_policy=precision, reshard_after_forward=not self.keeps)
        for root in self.called(model):
            shard(root, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        model.to_empty(device="cpu" if offload else self.device)
        fill(model, weights)
        return model

    def parts(self) -> DeviceMesh:
        """The data ranks in one row; with hsdp a row a node, and whole copies down the columns."""
        return self.mesh["replicate", "shard"] if self.config.hsdp else self.mesh["data"]

    def called(self, model: GPT) -> list[nn.Module]:
        """The modules that are called forward, whose parameters outside blocks are gathered then."""
        return [model]

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        assert isinstance(self.model, FSDPModule)  # what fully_shard has made of it
        self.model.set_requires_gradient_sync(last)
        self.model.set_reshard_after_backward(last or not self.keeps)
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        # on rank 0 alone, it says
        return self.whole(StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))

    def whole(self, options: StateDictOptions) -> dict[str, Tensor]:
        state = get_model_state_dict(self.model, options=options)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}

    @contextlib.contextmanager
    def generator(self) -> Iterator[GPT]:
        weights = self.whole(StateDictOptions(full_state_dict=True))  # on every rank
        yield assemble(self.model.config, weights.items(), self.device, adapter=self.model.adapter)
