"""Several processes under DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

    stage 0   everything whole on every rank: DeepSpeed sums the gradients, the rest is as in PyTorch's engines
    stage 1   optimizer state and float32 master weights in parts
    stage 2   gradients too: they are cut up as soon as they are there, in every micro-batch
    stage 3   parameters too: a module's are gathered when it is called; no process ever holds the model whole

In stages 1 to 3 bfloat16 and float16 are DeepSpeed's own modes (16-bit parameters beside the masters), and AdamW works
on flat shards of the masters; what is by parameter name here (weights, moments) is read and written through these.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from model import GPT
from model.adapters import Named
from model.folder import assemble
from training.config import Config
from training.engines.contract import Machine, Weights
from training.engines.deepspeed_config import Settings, deepspeed_settings, offload_device
from training.engines.named_state import MOMENTS, TAG, NamedState, named_state, write_universal
from training.engines.pytorch import Accumulating, PyTorchEngine, own_weights
from training.optimizer import build_optimizers, own_settings
from training.transfer import Deferred

LEARNT = {"exclude_frozen_parameters": True}  # of what its checkpoints hold
DeepSpeed = Any  # what deepspeed.initialize returns; it has no types


def deepspeed_engine(
    model: GPT, config: Config, machine: Machine, weights: Weights | None = None
) -> "ReplicatedEngine | ZeroEngine":
    """The engine of the stage that flags and file ask for. Raises ValueError where they contradict each other."""
    settings = deepspeed_settings(config, machine.dtype, machine.world.data_size)
    name_device(machine.device)
    engine = ReplicatedEngine if settings["zero_optimization"]["stage"] == 0 else ZeroEngine
    return engine(model, config, machine, weights, settings)


def name_device(device: torch.device) -> None:
    """DeepSpeed goes by LOCAL_RANK, also where no launcher has set it or --device cuda:1 says otherwise."""
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")


def initialize(model: GPT, optimizer: torch.optim.Optimizer, settings: Settings) -> DeepSpeed:
    with contextlib.redirect_stdout(io.StringIO()):  # its optimizers print memory tables
        network, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return network


class ReplicatedEngine(PyTorchEngine):
    """Stage 0. 16 bits without partitions are what autocast does, and better: the weights stay in float32."""

    name = "deepspeed"
    stage = 0
    averages = True
    network: DeepSpeed

    def __init__(self, model: GPT, config: Config, machine: Machine, weights: Weights | None, settings: Settings):
        self.settings = settings | {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "gradient_clipping": 0.0}
        super().__init__(model, config, machine, weights)

    def wrap(self) -> nn.Module:
        return initialize(self.model, self.optimizers[0], self.settings)

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        self.network.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.network.backward(self.scaler.scale(loss), scale_wrt_gas=False)


class ZeroEngine(Accumulating):
    """Stages 1 to 3: what a rank holds is a flat part of things."""

    name = "deepspeed"
    averages = True
    network: DeepSpeed

    def __init__(self, model: GPT, config: Config, machine: Machine, weights: Weights | None, settings: Settings):
        super().__init__(model, config, machine)
        self.compiled = bool(config.compile)  # its hooks stand within blocks, so that only who asks for it gets it
        self.settings, self.stage = settings, settings["zero_optimization"]["stage"]
        if self.dtype == torch.bfloat16 and settings["gradient_accumulation_steps"] > 1:
            settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        start = weights or own_weights(model)
        self.model = self.place(model)
        self.set_up_blocks()
        self.optimizers = build_optimizers(self.model, config)
        (self.optimizer,) = self.optimizers
        self.network = initialize(self.model, self.optimizer, settings)
        self.network.checkpoint_engine = BackgroundWriter()
        self.set_by_name(lambda: ((name, {"fp32": tensor}) for name, tensor in start()), step=0.0)

    def place(self, model: GPT) -> GPT:
        """The model's shapes; weights come once the masters are there to take them."""
        if self.stage < 3:
            return model.to_empty(device=self.device)
        deepspeed.init_distributed(dist_init_required=False, verbose=False)  # else Init takes itself to be alone
        with deepspeed.zero.Init(config_dict_or_path=self.settings):
            return GPT(model.config, model.adapter)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=False)  # DeepSpeed has its own modes

    # --- one update ---

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        self.network.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Deferred[float]:
        """DeepSpeed looks at the gradient itself, and waits for it; so the norm is there."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.step()
        if self.network.was_step_applied():
            return number(float(self.network.get_global_grad_norm()))
        # offloaded gradients of a skipped update are left in place, and would spoil all that follow
        for key in getattr(self.network.optimizer, "averaged_gradients", None) or {}:
            self.network.optimizer.averaged_gradients[key] = None
        return number(float("inf"))

    # --- state by parameter name ---

    def weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, full in self.full_weights(self.learnt()):
            if self.world.rank == 0:
                weights[name] = full.cpu()
        return weights

    def learnt(self) -> dict[str, nn.Parameter]:
        """What has masters; the weights beside an adapter have none."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def full_weights(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Named]:
        """Gathered from all ranks one at a time, for every rank."""
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    yield name, safe_get_full_fp32_param(parameter)
                else:
                    with deepspeed.zero.GatheredParameters(parameter):
                        yield name, parameter.detach().float().clone()

    @contextlib.contextmanager
    def generator(self) -> Iterator[GPT]:
        whole = self.model
        if self.stage == 3:
            weights = self.full_weights(dict(self.model.named_parameters()))
            whole = assemble(self.model.config, weights, self.device, adapter=self.model.adapter)
        with self.eagerly():
            yield whole.eval()

    @torch.no_grad()
    def set_by_name(self, source: Callable[[], Iterable[tuple[str, dict[str, Tensor]]]], step: float) -> None:
        """Put full tensors ("fp32" weights, and moments where given) into this rank's shards, and set AdamW's count."""
        self.make_optimizer_state()
        parameters = dict(self.model.named_parameters())
        for name, slots in source():
            parameter = parameters[name]
            for slot, tensor in slots.items():
                self.set_slot(parameter, slot, tensor)
        for shard, _ in self.shards():
            self.optimizer.state[shard]["step"].fill_(step)
        self.refresh_parameters()

    def set_slot(self, parameter: Any, slot: str, tensor: Tensor) -> None:
        if self.stage < 3:
            if not parameter.requires_grad:
                parameter.copy_(tensor)
            elif slot == "fp32":
                safe_set_full_fp32_param(parameter, tensor)
            else:
                safe_set_full_optimizer_state(parameter, tensor, slot)
            return
        # cut here: DeepSpeed's own cutting leaves out the padding of a parameter that its ranks do not divide
        size = parameter.ds_tensor.ds_numel
        rank = self.network.optimizer._get_param_partition_rank(parameter)
        shard = tensor.flatten()[rank * size : (rank + 1) * size]
        shard = nn.functional.pad(shard, (0, size - shard.numel()))
        if not parameter.requires_grad:
            parameter.ds_tensor.copy_(shard)
        elif slot == "fp32":
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, slot)

    def shards(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The flat float32 tensors that AdamW works on, each with its parameter group."""
        zero, groups = self.network.optimizer, self.optimizer.param_groups
        if self.stage == 3:
            flat = zero.fp32_partitioned_groups_flat
            return [(shard, groups[zero.sub_group_to_group_id[i]]) for i, shard in enumerate(flat)]
        flat = getattr(zero, "fp32_groups_flat_partition", None) or zero.single_partition_of_fp32_groups
        return list(zip(flat, groups, strict=True))

    def make_optimizer_state(self) -> None:
        """What AdamW makes in its first step, so that it can be set before that."""
        for shard, group in self.shards():
            state = self.optimizer.state[shard]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=shard.device if group.get("fused") else "cpu")
                state |= {moment: torch.zeros_like(shard) for moment in MOMENTS}
        if self.stage < 3:
            # linked to parameters once; where that came before the state of the second group, link again
            self.network.optimizer._hp_optimizer_states_linked = False
            self.network.optimizer._lazy_init_hp_params_optimizer_state()

    def refresh_parameters(self) -> None:
        """Masters -> the parameters the network computes with."""
        zero = self.network.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    # --- checkpoints ---

    def save(self, folder: Path, background: bool) -> Future[Any] | None:
        if "nvme" in self.form()["offload"]:
            self.save_by_name(folder)
            return None
        with contextlib.redirect_stdout(io.StringIO()):
            # the marks are what the universal tool asks of a model that is not Megatron's
            marks = {"universal_checkpoint_info": {}, "iteration": 0}
            self.network.save_checkpoint(str(folder), tag=TAG, client_state=marks, save_latest=False, **LEARNT)
        if self.world.rank == 0:
            (folder / "form.json").write_text(json.dumps(self.form()))
        written = self.network.checkpoint_engine.written()
        if background:
            return written
        written.result()
        return None

    @torch.no_grad()
    def save_by_name(self, folder: Path) -> None:
        """State that lives on a disk, parameter by parameter, the ranks taking turns to write: DeepSpeed's own files of
        it do not come back as they were."""
        step = float(self.optimizer.state[self.shards()[0][0]]["step"])
        problem: OSError | None = None
        for i, (name, parameter) in enumerate(self.learnt().items()):
            slots = {"fp32": safe_get_full_fp32_param(parameter)}
            slots |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if i % self.world.size == self.world.rank and problem is None:
                try:
                    write_universal(folder, name, {slot: tensor.cpu() for slot, tensor in slots.items()}, step)
                except OSError as error:  # a full disk; told at the end, since the other ranks gather on
                    problem = error
        if problem is not None:
            raise problem

    def form(self) -> dict[str, Any]:
        """What must be equal for DeepSpeed to read its own files as they are."""
        zero = self.settings["zero_optimization"]
        devices = [offload_device(zero, name) for name in ("offload_optimizer", "offload_param")]
        return {"ranks": self.world.size, "stage": self.stage, "dtype": str(self.dtype), "offload": devices}

    def load(self, folder: Path) -> None:
        form = folder / "form.json"
        if form.is_file() and json.loads(form.read_text()) == self.form():
            strict = self.model.adapter is None
            with contextlib.redirect_stdout(io.StringIO()), own_settings([self.optimizer]):
                self.network.load_checkpoint(
                    str(folder), tag=TAG, load_lr_scheduler_states=False, load_module_strict=strict
                )
            return
        with named_state(folder, self) as state:
            self.take_over(state)

    def take_over(self, state: NamedState) -> None:
        shapes = {name: parameter_shape(p) for name, p in self.learnt().items()}
        self.set_by_name(lambda: ((name, state.read(name, shape)) for name, shape in shapes.items()), state.step)


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def number(value: float) -> Deferred[float]:
    return Deferred(torch.tensor([value], dtype=torch.float64), lambda numbers: numbers[0])


class BackgroundWriter(CheckpointEngine):
    """Writes DeepSpeed's files in a thread, from copies; `written` ends when they are on the disk."""

    def __init__(self) -> None:
        self.name = "background"
        self.pool = ThreadPoolExecutor(1, "deepspeed-checkpoint")
        self.jobs: list[Future[None]] = []

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        self.jobs.append(self.pool.submit(torch.save, copied(state_dict), path))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        return True

    def written(self) -> Future[Any]:
        jobs, self.jobs = self.jobs, []
        return self.pool.submit(lambda: [job.result() for job in jobs])


def copied(value: Any) -> Any:
    """The same structure with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value
