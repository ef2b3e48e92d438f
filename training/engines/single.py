"""One process, one device: micro-batches in, one optimizer step out.

Gradients are sums divided once by the weight of the whole update, so that 8 rows at once and 2 x 4 accumulated give the
same gradient, whatever the number of supervised tokens in each.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dataset.batch import Batch
from model import GPT
from training.config import Config
from training.distributed import World
from training.objectives import Objective
from training.optimizer import build_optimizers


class SingleEngine:
    """Holds the model, the optimizers and the loss scaler."""

    name = "single"

    def __init__(self, model: GPT, config: Config, device: torch.device, dtype: torch.dtype, world: World):
        self.config, self.device, self.dtype, self.world = config, device, dtype, world
        self.model = model.to(device)
        self.model.model.grad_checkpointing = config.grad_checkpointing
        if config.compile:
            for block in self.model.model.layers:
                block.compile(dynamic=False)
        self.network: nn.Module = self.wrap()
        self.optimizers = build_optimizers(self.model, config, fused=device.type != "mps")
        # scales the loss so that small float16 gradients do not vanish; does nothing in the other types
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.losses: list[Tensor] = []  # of the last update's micro-batches, to name the rows of a non-finite one

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
                self.scaler.scale(loss * (self.gradient_scale / max(weight, 1.0))).backward()
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

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    # --- what another way of spreading changes ---

    gradient_scale = 1.0

    def wrap(self) -> nn.Module:
        return self.model

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        """Any picklable value of every rank."""
        return [value]

    def barrier(self) -> None:
        pass

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU, by Hugging Face name."""
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        """Full-precision weights, optimizer state and scaler, by parameter name."""
        with quiet_checkpoint():
            dcp.save(self.state() | {"scaler": self.scaler.state_dict()}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """The inverse of `save`."""
        state = self.state() | {"scaler": self.scaler.state_dict()}
        with quiet_checkpoint():
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])


@contextlib.contextmanager
def quiet_checkpoint() -> Iterator[None]:
    """torch warns that one process saves alone; that is what is meant."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        yield
