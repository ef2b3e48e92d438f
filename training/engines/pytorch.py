"""Micro-batches one after another (`Accumulating`), and what PyTorch's engines share beside that (`PyTorchEngine`): one
process, DDP, FSDP, and DeepSpeed where it partitions nothing.

place    the model on its device (or this rank's part of it), with its weights
wrap     what is called forward
step     unscale, clip, update: parameters and optimizer state in float32, 16 bits by autocast
save     torch.distributed.checkpoint files, which any number of ranks reads
"""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, distribute_tensor

from dataset.batch import Batch
from model import GPT
from model.attention import Layout
from model.gpt import nll_by_place
from training import distributed
from training.config import Config
from training.engines import torch_files
from training.engines.contract import B, Machine, T, Totals, Weights
from training.engines.named_state import NamedState, is_deepspeed, named_state
from training.objectives import Objective, Output
from training.optimizer import FOUND_INF, LR_SCALE, build_optimizers, own_settings
from training.transfer import Deferred

# one process that saves alone is what is meant; said once and for all, since background threads save as well
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

# not the weights beside an adapter, which the starting folder has; that none is missing is asked where files are read
LEARNT = StateDictOptions(ignore_frozen_params=True, strict=False)


Asked = tuple[Tensor, ...]  # the fields of an Output


class Accumulating:
    """Micro-batches one after another, gradients added up: all engines but a pipeline.

    The gradient is a sum divided once by the weight of the whole update, so that 8 rows at once and 2 x 4 accumulated
    give the same, whatever the number of supervised tokens in each.
    """

    name = "single"
    compiler = "inductor"  # a backend of torch.compile
    averages = False  # whether gradients are averaged over data ranks on the way; the loss is scaled up for it
    network: nn.Module  # what is called: the model, or what stands around it

    def __init__(self, model: GPT, config: Config, machine: Machine):
        self.model, self.config = model, config
        self.world, self.device, self.dtype = machine
        self.compiled = distributed.pick_compile(config.compile, self.device)
        distributed.use_tensor_cores(self.device, self.dtype)

    def set_up_blocks(self) -> None:
        """What flags ask of the network's blocks, once they are where they stay."""
        self.model.recompute_activations(self.config.grad_checkpointing)
        if self.compiled:
            self.model.compile_parts(self.compiler)

    # --- what a way of spreading decides ---

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        """Around each micro-batch; gradients need to travel after the last one only."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    # --- one update ---

    def ask(self, batch: Batch, objective: Objective[Any] | None = None) -> Output:
        """Of this engine's network. Without an objective it is asked for the single places."""
        return ask(self.network, batch, nll_by_place if objective is None else objective.criterion)

    def ask_each(self, batches: list[B], objective: Objective[Any] | None = None) -> list[Output]:
        """The same of several, without gradients."""
        return [self.ask(batch, objective) for batch in batches]

    def forward_backward(
        self, micro_batches: list[B], objective: Objective[B], weight: float | None = None
    ) -> Deferred[Totals]:
        self.model.train()
        weight, scale = self.weighed(micro_batches, objective, weight)
        totals = torch.zeros(len(objective.names), device=self.device, dtype=torch.float32)
        losses = []
        for i, batch in enumerate(micro_batches):
            with self.communicate_if(i == len(micro_batches) - 1):
                batch = batch.to(self.device)
                with self.autocast():
                    loss, sums = objective(self.ask(batch, objective), batch)
                self.backward(loss * scale)
            totals += torch.stack([sums[name].float() for name in objective.names])
            losses.append(sums["loss"].float())
        return self.deferred(objective.names, totals, weight, losses)

    def weighed(self, micro_batches: list[B], objective: Objective[B], weight: float | None) -> tuple[float, float]:
        """The weight of an update, summed over data ranks where it is not known, and what a loss is multiplied by."""
        if weight is None:
            weight = self.sum_over_data([sum(objective.weight(batch) for batch in micro_batches)])[0]
        return weight, (self.world.data_size if self.averages else 1) / max(weight, 1.0)

    def deferred(self, names: tuple[str, ...], totals: Tensor, weight: float, losses: list[Tensor]) -> Deferred[Totals]:
        """Sums over data ranks, made on the device in float64, with this rank's losses behind them."""
        if dist.is_initialized():
            totals = totals.double()
            dist.all_reduce(totals, group=self.data_group)
        n = len(names)
        return Deferred(
            torch.cat([totals, torch.stack(losses)]),
            lambda numbers: Totals(dict(zip(names, numbers[:n], strict=True)), weight, numbers[n:]),
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: list[B], objective: Objective[B]) -> Totals:
        self.model.eval()
        totals = [0.0] * (len(objective.names) + 1)
        losses = []
        batches = [batch.to(self.device) for batch in micro_batches]
        with self.autocast():
            for batch, output in zip(batches, self.ask_each(batches, objective), strict=True):
                _, sums = objective(output, batch)
                here = [*(float(sums[name]) for name in objective.names), float(objective.weight(batch))]
                totals = [a + b for a, b in zip(totals, here, strict=True)]
                losses.append(float(sums["loss"]))
        *summed, weight = self.sum_over_data(totals)
        return Totals(dict(zip(objective.names, summed, strict=True)), weight, losses)

    @torch.no_grad()
    def per_place(self, batch: Batch, objective: Objective[Any] | None = None) -> Output:
        self.model.eval()
        with self.autocast():
            (output,) = self.ask_each([batch.to(self.device)], objective)
        return output

    @contextlib.contextmanager
    def generator(self) -> Iterator[GPT]:
        with self.eagerly():
            yield self.model.eval()

    def eagerly(self) -> contextlib.AbstractContextManager:
        """Around generation with the network itself: every token is another length, and would be another graph."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    @property
    def scales_loss(self) -> bool:
        return self.dtype == torch.float16

    # --- what ranks tell each other ---

    @cached_property
    def mesh(self) -> DeviceMesh:
        return self.world.mesh(self.device, self.config.hsdp)

    @cached_property
    def data_group(self) -> dist.ProcessGroup | None:
        """This rank's peers in the data; None where those are all ranks."""
        if self.world.model_size == 1:
            return None
        return (self.world.mesh(self.device) if self.config.hsdp else self.mesh).get_group("data")

    def sum_over_data(self, values: list[float]) -> list[float]:
        return distributed.sum_over_ranks(values, self.device, self.data_group)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return distributed.sum_over_ranks(values, self.device)

    @cached_property
    def host_group(self) -> dist.ProcessGroup | None:
        return distributed.host_group(self.config.comm_timeout)

    def sum_on_host(self, values: list[float]) -> list[float]:
        return distributed.sum_on_host(values, self.host_group)

    def gather(self, value: T) -> list[T]:
        return distributed.gather(value)

    def barrier(self) -> None:
        distributed.barrier(self.device)


class PyTorchEngine(Accumulating):
    """Holds the model, the optimizers and the loss scaler.

    model may stand on the meta device; `weights` then fill it, one parameter at a time. Without `weights` the model
    brings its own.
    """

    def __init__(self, model: GPT, config: Config, machine: Machine, weights: Weights | None = None):
        super().__init__(model, config, machine)
        # scales the loss so that small float16 gradients do not vanish; does nothing in the other types
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.model = self.place(model, weights or own_weights(model))
        self.set_up_blocks()
        self.optimizers = build_optimizers(self.model, config, fused=self.device.type != "mps")
        self.network = self.wrap()

    def place(self, model: GPT, weights: Weights) -> GPT:
        """The model on its device, with its weights."""
        model = model.to_empty(device=self.device)
        fill(model, weights)
        return model

    def wrap(self) -> nn.Module:
        """What is called forward, once optimizers are built."""
        return self.model

    # --- one update ---

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> Deferred[float]:
        """Clip, update, clear. Returns the gradient's norm before clipping; a non-finite one skips the update."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get(LR_SCALE, 1.0)
            self.scaler.unscale_(optimizer)
        norm = self.clip_gradients()
        # to ask whether it is finite would wait for it: the optimizers look themselves, on the device
        skipped = norm.isfinite().logical_not().float()
        for optimizer in self.optimizers:
            setattr(optimizer, FOUND_INF, skipped)
            optimizer.step()
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Deferred(norm.reshape(1), lambda numbers: numbers[0])

    def clip_gradients(self) -> Tensor:
        norm = self.gradient_norm()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip or float("inf"), norm)
        return norm

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient, wherever its parts are; float32 ()."""
        squares: defaultdict[Any, list[Tensor]] = defaultdict(list)  # by the ranks that have the other parts
        for parameter in self.counted():
            if parameter.grad is not None:
                squares[spread(parameter.grad)].append(square(local(parameter.grad)))
        return torch.stack([summed(torch.stack(these).sum(), *over) for over, these in squares.items()]).sum().sqrt()

    def counted(self) -> Iterable[nn.Parameter]:
        """The parameters that stand for the whole model's, each once."""
        return self.model.parameters()

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        if self.world.rank:
            return {}
        return {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Any]:
        """Full-precision weights, optimizer state and scaler, by parameter name; each rank its part."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=LEARNT)
        return {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        with own_settings(self.optimizers):
            set_state_dict(
                self.model, self.optimizers,
                model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=LEARNT,
            )  # fmt: skip
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def save(self, folder: Path, background: bool) -> Future[Any] | None:
        alone = not dist.is_initialized()
        state = self.state()
        # settings are what flags say then; and a rank that has some parameters knows the groups of these alone
        del state["optimizer"]["param_groups"]
        if not background:
            dcp.save(state, checkpoint_id=folder, no_dist=alone)
            return None
        written = dcp.async_save(state, checkpoint_id=folder, process_group=self.side_group, no_dist=alone)
        assert isinstance(written, Future)
        return written

    @cached_property
    def side_group(self) -> dist.ProcessGroup | None:
        """A group of its own for checkpoints in the background, whose messages would else mix with the training's."""
        if not dist.is_initialized():
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.comm_timeout))

    def load(self, folder: Path) -> None:
        """The inverse of `save`, from any number of ranks and any engine."""
        if is_deepspeed(folder):
            with named_state(folder, self) as named:
                self.take_over(named)
            return
        state = self.state()
        groups = state["optimizer"].pop("param_groups")
        # one written in a type that scales no loss has no scale, and the scaler looks for it anew
        if "scaler.scale" not in torch_files.keys(folder):
            state["scaler"] = {}
        torch_files.load(state, folder, alone=not dist.is_initialized())
        state["optimizer"]["param_groups"] = groups
        self.set_state(state)

    @torch.no_grad()
    def take_over(self, named: NamedState) -> None:
        """Put in weights, moments and AdamW's count, by name."""
        state = self.state()
        for name, weight in state["model"].items():
            slots = state["optimizer"]["state"][name]
            for slot, full in named.read(name, weight.shape).items():
                held = weight if slot == "fp32" else slots[slot]
                held.copy_(like(held, full))
            slots["step"].fill_(named.step)
        self.set_state(state)


class SingleEngine(PyTorchEngine):
    """One process, one device, everything whole."""

    name = "single"


def ask(network: Callable[..., Asked], batch: Batch, criterion: Callable[..., Asked]) -> Output:
    """The one place where a batch meets a network, the engine's or a frozen one; only a teacher, of whom hidden states
    are wanted, is asked elsewhere."""
    return Output(
        *network(
            batch.input_ids, batch.position_ids, batch.labels,
            layout=layout_of(batch), learnt=batch.learnt, criterion=partial(criterion, batch=batch),
        )
    )  # fmt: skip


def layout_of(batch: Batch) -> Layout:
    return Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which ranks hold parts, put together on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def square(tensor: Tensor) -> Tensor:
    """The sum of the squares, float32 (). A row at a time: added one after another, as PyTorch's norm adds on a CPU,
    those of an embedding are off by 1e-4, and by something else wherever the matrix is cut."""
    return torch.linalg.vector_norm(tensor, dim=-1).square().sum()


def spread(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | tuple[()]:
    """Where the other parts are."""
    return (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else ()


def summed(part: Tensor, mesh: DeviceMesh | None = None, placements: tuple[Placement, ...] = ()) -> Tensor:
    """Over the ranks that have a part of what is `spread` so, each part once."""
    if mesh is None:
        return part
    # fully_shard has added up what was Partial
    over = [place if place.is_replicate() else Partial() for place in placements]
    return DTensor.from_local(part, mesh, over, run_check=False).full_tensor()


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
