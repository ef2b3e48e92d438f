"""Several processes under DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

    stage 0   everything whole on every rank: DeepSpeed sums the gradients, the rest is as in the single engine
    stage 1   optimizer state and float32 master weights in parts
    stage 2   gradients too: they are cut up as soon as they are there, in every micro-batch
    stage 3   parameters too: a module's are gathered when it is called; no process ever holds the model whole

In stages 1 to 3 bfloat16 and float16 are DeepSpeed's own modes (16-bit parameters beside the masters), and AdamW works
on flat pieces of the masters; what is by parameter name here (weights, moments) is read and written through these.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable
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
from training.engines.deepspeed_config import deepspeed_settings, offload_device
from training.engines.named_state import MOMENTS, TAG, NamedState, write_universal
from training.engines.single import SingleEngine, Weights
from training.optimizer import build_optimizers


class DeepSpeedEngine(SingleEngine):
    name = "deepspeed"

    def place(self, model: GPT, weights: Weights) -> GPT:
        self.gradient_scale = float(self.world.size)  # DeepSpeed averages over ranks
        self.settings = deepspeed_settings(self.config, self.dtype, self.world.size)
        self.stage = self.settings["zero_optimization"]["stage"]
        self.start_weights = weights
        if self.stage == 0:
            # 16-bit without partitions is what autocast does, and better: the weights stay in float32
            self.settings |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "gradient_clipping": 0.0}
            return super().place(model, weights)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)  # DeepSpeed has one of its own
        if self.dtype == torch.bfloat16 and self.settings["gradient_accumulation_steps"] > 1:
            self.settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if self.stage == 3:
            os.environ.setdefault("LOCAL_RANK", "0")  # asked for even where no launcher has set it
            deepspeed.init_distributed(dist_init_required=False, verbose=False)  # else Init takes itself to be alone
            with deepspeed.zero.Init(config_dict_or_path=self.settings):
                return GPT(model.config)
        return model.to_empty(device=self.device)

    def wrap(self) -> nn.Module:
        self.optimizers = build_optimizers(self.model, self.config)
        with contextlib.redirect_stdout(io.StringIO()):  # its optimizers print memory tables
            network, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizers[0], config=self.settings, dist_init_required=False
            )
        network.checkpoint_engine = BackgroundWriter()
        self.network: Any = network
        if self.stage:
            self.set_by_name(lambda: ((name, {"fp32": tensor}) for name, tensor in self.start_weights()), step=0.0)
        return network

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.stage == 0 and self.dtype != torch.float32
        )

    # --- one update ---

    def communicate_if(self, last: bool) -> contextlib.AbstractContextManager:
        self.network.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.network.backward(self.scaler.scale(loss), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        if self.stage == 0:
            return super().step(learning_rate)
        for group in self.optimizers[0].param_groups:
            group["lr"] = learning_rate
        self.network.step()
        if self.network.was_step_applied():
            return float(self.network.get_global_grad_norm())
        # offloaded gradients of a skipped update are left in place, and would spoil all that follow
        for key in getattr(self.network.optimizer, "averaged_gradients", None) or {}:
            self.network.optimizer.averaged_gradients[key] = None
        return float("inf")

    # --- state by parameter name ---

    def weights(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().weights()
        weights = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                full = safe_get_full_fp32_param(parameter)  # from all ranks
                if self.world.rank == 0:
                    weights[name] = full.cpu()
        return weights

    def whole_model(self) -> GPT | None:
        return self.model if self.stage < 3 else self.gathered_model()

    @torch.no_grad()
    def set_by_name(self, source: Callable[[], Iterable[tuple[str, dict[str, Tensor]]]], step: float) -> None:
        """Put full tensors ("fp32" weights, and moments where given) into this rank's pieces, and set AdamW's count."""
        self.make_optimizer_state()
        parameters = dict(self.model.named_parameters())
        for name, parts in source():
            parameter = parameters[name]
            for part, tensor in parts.items():
                self.set_part(parameter, part, tensor)
        for piece, _ in self.pieces():
            self.optimizers[0].state[piece]["step"].fill_(step)
        self.refresh_parameters()

    def set_part(self, parameter: Any, part: str, tensor: Tensor) -> None:
        if self.stage < 3:
            if part == "fp32":
                safe_set_full_fp32_param(parameter, tensor)
            else:
                safe_set_full_optimizer_state(parameter, tensor, part)
            return
        # cut here: DeepSpeed's own cutting leaves out the padding of a parameter that its ranks do not divide
        size = parameter.ds_tensor.ds_numel
        rank = self.network.optimizer._get_param_partition_rank(parameter)
        piece = tensor.flatten()[rank * size : (rank + 1) * size]
        piece = nn.functional.pad(piece, (0, size - piece.numel()))
        if part == "fp32":
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, part)

    def pieces(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The flat float32 tensors that AdamW works on, each with its parameter group."""
        zero, groups = self.network.optimizer, self.optimizers[0].param_groups
        if self.stage == 3:
            flat = zero.fp32_partitioned_groups_flat
            return [(piece, groups[zero.sub_group_to_group_id[i]]) for i, piece in enumerate(flat)]
        flat = getattr(zero, "fp32_groups_flat_partition", None) or zero.single_partition_of_fp32_groups
        return list(zip(flat, groups, strict=True))

    def make_optimizer_state(self) -> None:
        """What AdamW makes in its first step, so that it can be set before that."""
        for piece, group in self.pieces():
            state = self.optimizers[0].state[piece]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=piece.device if group.get("fused") else "cpu")
                state |= {moment: torch.zeros_like(piece) for moment in MOMENTS}
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

    def save(self, folder: Path, background: bool) -> Future | None:
        if self.stage == 0:
            return super().save(folder, background)
        if "nvme" in self.form()["offload"]:
            self.save_by_name(folder)
            return None
        with contextlib.redirect_stdout(io.StringIO()):
            # the marks are what the universal tool asks of a model that is not Megatron's
            marks = {"universal_checkpoint_info": {}, "iteration": 0}
            self.network.save_checkpoint(str(folder), tag=TAG, client_state=marks, save_latest=False)
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
        step = float(self.optimizers[0].state[self.pieces()[0][0]]["step"])
        problem: OSError | None = None
        for i, (name, parameter) in enumerate(self.model.named_parameters()):
            parts = {"fp32": safe_get_full_fp32_param(parameter)}
            parts |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if i % self.world.size == self.world.rank and problem is None:
                try:
                    write_universal(folder, name, {part: tensor.cpu() for part, tensor in parts.items()}, step)
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
        if self.stage == 0:
            super().load(folder)
            return
        form = folder / "form.json"
        if form.is_file() and json.loads(form.read_text()) == self.form():
            with contextlib.redirect_stdout(io.StringIO()):
                self.network.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
            return
        self.adopt(folder)

    def take_over(self, state: NamedState) -> None:
        if self.stage == 0:
            super().take_over(state)
            return
        shapes = {name: parameter_shape(p) for name, p in self.model.named_parameters()}
        self.set_by_name(lambda: ((name, state.read(name, shape)) for name, shape in shapes.items()), state.step)


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


class BackgroundWriter(CheckpointEngine):
    """Writes DeepSpeed's files in a thread, from copies; `written` ends when they are on the disk."""

    def __init__(self) -> None:
        self.name = "background"
        self.pool = ThreadPoolExecutor(1, "deepspeed-checkpoint")
        self.jobs: list[Future] = []

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

    def written(self) -> Future:
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
