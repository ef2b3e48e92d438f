"""One process, one device: micro-batches in, one optimizer step out.

Gradients are sums divided once by the weight of the whole update, so that 8 rows at once and 2 x 4 accumulated give the
same gradient, whatever the number of supervised tokens in each.
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from dataset.batch import Batch
from model import GPT
from model.folder import assemble
from training import distributed
from training.config import Config
from training.distributed import World
from training.engines.named_state import (
    TAG,
    NamedState,
    UniversalState,
    is_deepspeed,
    is_universal,
    make_universal,
    scratch_folder,
)
from training.objectives import Objective
from training.optimizer import build_optimizers

# one process that saves alone is what is meant; said once and for all, since background threads save as well
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

Weights = Callable[[], Iterable[tuple[str, Tensor]]]  # name and full float32 tensor of every parameter, at every call


class SingleEngine:
    """Holds the model, the optimizers and the loss scaler.

    model may stand on the meta device; `weights` then fill it, one parameter at a time. Without `weights` the model
    brings its own.
    """

    name = "single"

    def __init__(
        self,
        model: GPT,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        weights: Weights | None = None,
    ):
        self.config, self.device, self.dtype, self.world = config, device, dtype, world
        self.losses: list[Tensor] = []  # of the last update's micro-batches, to name the rows of a non-finite one
        # scales the loss so that small float16 gradients do not vanish; does nothing in the other types
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.model = self.place(model, weights or own_weights(model))
        self.model.model.grad_checkpointing = config.grad_checkpointing
        if config.compile:
            for block in self.model.model.layers:
                block.compile(dynamic=False)
        self.network: nn.Module = self.wrap()

    # --- one update ---

    def forward_backward(self, micro_batches: list[Batch], objective: Objective) -> tuple[dict[str, float], float]:
        """Accumulate the gradient of sum(loss) / sum(weight), both over all micro-batches and ranks.

        Returns the objective's sums and the weight, over all ranks.
        """
        self.model.train()
        weight = self.sum_over_ranks([sum(objective.weight(batch) for batch in micro_batches)])[0]
        totals = torch.zeros(len(objective.names), device=self.device, dtype=torch.float32)
        self.losses = []
        for i, batch in enumerate(micro_batches):
            with self.communicate_if(i == len(micro_batches) - 1):
                with self.autocast():
                    loss, sums = objective(self.network, batch.to(self.device))
                self.backward(loss * (self.gradient_scale / max(weight, 1.0)))
            totals += torch.stack([sums[name].float() for name in objective.names])
            self.losses.append(sums["loss"])
        return dict(zip(objective.names, self.sum_over_ranks(totals.tolist()), strict=True)), weight

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear. Returns the gradient's norm before clipping; a non-finite one skips the update."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            self.scaler.unscale_(optimizer)
        norm = self.clip_gradients()
        if norm.isfinite():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def clip_gradients(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or float("inf"))

    @torch.no_grad()
    def evaluate(self, micro_batches: list[Batch], objective: Objective) -> tuple[dict[str, float], float]:
        """The objective's sums and weight over these micro-batches and all ranks, without gradients."""
        self.model.eval()
        totals = [0.0] * (len(objective.names) + 1)
        for batch in micro_batches:
            with self.autocast():
                _, sums = objective(self.network, batch.to(self.device))
            here = [*(float(sums[name]) for name in objective.names), float(objective.weight(batch))]
            totals = [a + b for a, b in zip(totals, here, strict=True)]
        totals = self.sum_over_ranks(totals)
        return dict(zip(objective.names, totals, strict=False)), totals[-1]

    @torch.no_grad()
    def apply(self, function: Callable[[nn.Module], Any]) -> Any:
        """function(network) in eval mode under autocast, on every rank."""
        self.model.eval()
        with self.autocast():
            return function(self.network)

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler looks for its scale, which takes a few updates that are not finite."""
        return self.dtype == torch.float16

    # --- what another way of spreading changes ---

    gradient_scale = 1.0

    def place(self, model: GPT, weights: Weights) -> GPT:
        """The model on its device, with its weights."""
        model = model.to_empty(device=self.device)
        fill(model, weights)
        return model

    def wrap(self) -> nn.Module:
        """What is called forward, once optimizers are built."""
        self.optimizers = build_optimizers(self.model, self.config, fused=self.device.type != "mps")
        return self.model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        """Around each micro-batch; gradients need to travel after the last one only."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    # --- what ranks tell each other ---

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return distributed.sum_over_ranks(values, self.device)

    def gather(self, value: Any) -> list[Any]:
        """Any picklable value of every rank."""
        return distributed.gather(value)

    def barrier(self) -> None:
        distributed.barrier(self.device)

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU, by Hugging Face name; on rank 0 alone. Every rank must call it."""
        if self.world.rank:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}

    def whole_model(self) -> GPT | None:
        """A model to generate with, on rank 0 at least. Every rank must call it."""
        return self.model

    def gathered_model(self) -> GPT | None:
        """A plain copy of a sharded model, on rank 0 alone. Every rank must call it."""
        weights = self.weights()
        return assemble(self.model.config, weights.items(), self.device) if self.world.rank == 0 else None

    def state(self) -> dict[str, Any]:
        """Full-precision weights, optimizer state and scaler, by parameter name; each rank its part."""
        model, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def save(self, folder: Path, background: bool) -> Future | None:
        """Write the state from all ranks side by side. In the background: a copy is taken now, the Future ends with the write."""
        alone = not dist.is_initialized()
        if background:
            group = self.side_group()
            return dcp.async_save(self.state(), checkpoint_id=folder, process_group=group, no_dist=alone)  # type: ignore[return-value]
        dcp.save(self.state(), checkpoint_id=folder, no_dist=alone)
        return None

    def side_group(self) -> dist.ProcessGroup | None:
        """A group of its own for checkpoints in the background, whose messages would else mix with the training's."""
        if dist.is_initialized() and not hasattr(self, "_side_group"):
            limit = timedelta(seconds=self.config.comm_timeout)
            self._side_group = dist.new_group(backend="gloo", timeout=limit)
        return getattr(self, "_side_group", None)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, from any number of ranks and any engine."""
        if is_deepspeed(folder):
            self.adopt(folder)
            return
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        self.set_state(state)

    def adopt(self, folder: Path) -> None:
        """Go on from a checkpoint of another kind of engine, or of another number of DeepSpeed's ranks."""
        if not is_deepspeed(folder) or is_universal(folder):
            self.take_over(UniversalState(folder) if is_universal(folder) else NamedState(folder))
            return
        problem = None
        if self.world.rank == 0:
            try:
                make_universal(folder)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if problem := self.gather(problem)[0]:
            raise ValueError(f"{folder} could not be turned into DeepSpeed's universal form ({problem})")
        self.take_over(UniversalState(scratch_folder(folder) / TAG))
        self.barrier()
        if self.world.rank == 0:
            shutil.rmtree(scratch_folder(folder))

    @torch.no_grad()
    def take_over(self, named: NamedState) -> None:
        """Put in weights, moments and AdamW's count, by name."""
        state = self.state()
        for name, weight in state["model"].items():
            slots = state["optimizer"]["state"][name]
            for part, full in named.read(name, weight.shape).items():
                slot = weight if part == "fp32" else slots[part]
                slot.copy_(like(slot, full))
            slots["step"].fill_(named.step)
        self.set_state(state)

    def set_state(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])


def like(slot: Tensor, full: Tensor) -> Tensor:
    """A full tensor that every rank has, cut for this rank where `slot` is cut."""
    if not isinstance(slot, DTensor):
        return full
    return distribute_tensor(full.to(slot.device), slot.device_mesh, slot.placements, src_data_rank=None)


def own_weights(model: GPT) -> Weights:
    kept = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return lambda: kept.items()


@torch.no_grad()
def fill(model: GPT, weights: Weights) -> None:
    """Copy full tensors into a model's parameters, whole or this rank's part of each."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights():
        parameter = parameters.pop(name)
        parameter.copy_(like(parameter, tensor))
    assert not parameters, f"no weights for {list(parameters)}"
