"""Several processes, each with a part of every parameter, gradient and optimizer state (PyTorch's fully_shard, FSDP2).

A block's parameters are gathered for its forward and its backward pass and dropped after; gradients are summed and cut
up in one go (ZeRO stage 3: Rajbhandari et al. 2020, arXiv:1910.02054). The model starts on the meta device and each rank
fills in its own part, so no process ever holds it whole. With --hsdp a node holds one whole copy among its processes.
"""

import contextlib

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import GPT
from training.engines.single import SingleEngine, Weights, fill


class FSDPEngine(SingleEngine):
    name = "fsdp"

    def place(self, model: GPT, weights: Weights) -> GPT:
        self.gradient_scale = float(self.world.size)  # reduce-scatter averages over ranks, as DDP does
        offload = self.config.offload == "cpu"
        settings = {
            "mesh": self.mesh(),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy(),
        }
        # blocks travel in the lower precision; their gradients are summed in float32. Embedding, last norm and head stay
        # in float32 until autocast takes them, so that what flows between blocks is the same as without sharding.
        half = None if self.dtype == torch.float32 else self.dtype
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model = model.to("meta")
        for block in model.model.layers:
            fully_shard(block, mp_policy=precision, **settings)  # type: ignore[call-overload]
        fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)  # type: ignore[call-overload]
        model.to_empty(device="cpu" if offload else self.device)
        fill(model, weights)
        return model

    def mesh(self) -> DeviceMesh:
        """All ranks in one row; with hsdp a row a node, and whole copies down the columns."""
        nodes, left = divmod(self.world.size, self.world.local_size)
        if not self.config.hsdp:
            return init_device_mesh(self.device.type, (self.world.size,), mesh_dim_names=("shard",))
        if left:
            raise ValueError(
                f"--hsdp needs the same number of processes on every node; {self.world.size} processes are not a multiple of the {self.world.local_size} here"
            )
        shape = (nodes, self.world.local_size)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard gives the model this method
        return contextlib.nullcontext()

    def clip_gradients(self) -> Tensor:
        norm = super().clip_gradients()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self) -> dict[str, Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)  # type: ignore[return-value]

    def whole_model(self) -> GPT | None:
        return self.gathered_model()
