"""Parameters in, optimizers and a learning rate for every step out.

build_optimizers(model, config)      [AdamW over 4 groups] or [Muon over hidden matrices, AdamW over the rest]
learning_rate(0, 100, config)        linear warm-up, then cosine or warm-up - stable - decay
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from model import GPT, GPTConfig
from model.gpt import Role
from training.config import Config
from training.distributed import TENSOR

# What an optimizer is told of its gradients by, as torch.amp.GradScaler does it: an attribute, float32 (), on the
# device; 1 where one is not finite, and the step must leave weights, moments and counts as they were.
FOUND_INF = "found_inf"
LR_SCALE = "lr_scale"  # a group's key: its rate is so many times the others'
EMBEDDING_SCALE = 10.0
# Peak rates where nobody gives one, and the width they were tried at.
ADAMW_RATE, MUON_RATE, TRIED_AT = 1.5e-3, 5e-3, 256


def build_optimizers(model: GPT, config: Config, fused: bool = True) -> list[Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with decay on matrices only; optionally Muon for hidden matrices.

    Muon's update is scaled to AdamW's RMS (Moonshot, arXiv:2502.16982), so one learning rate serves both; embeddings,
    of whose rows an update sees few, learn EMBEDDING_SCALE times as fast beside it. All of them heed FOUND_INF.
    """
    rate = peak_rate(config)
    roles = model.roles()
    learnt = [(roles[name], p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for role, p in learnt if role.orthogonal]
    others = [p for role, p in learnt if role.decays and not role.orthogonal]
    looked_up = [p for role, p in learnt if role is Role.EMBEDDING]
    rest = [p for role, p in learnt if not role.decays and role is not Role.EMBEDDING]
    decay, no_decay = {"weight_decay": config.weight_decay}, {"weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, lr=rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused)
    if not hidden or config.optimizer == "adamw":  # an adapter has no hidden matrix for Muon
        groups = [{"params": hidden + others, **decay}, {"params": looked_up + rest, **no_decay}]
        return [heeding(adamw([group for group in groups if group["params"]]))]
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    muon.register_step_pre_hook(whole_over_tensor_ranks)
    groups = [
        {"params": others, **decay},
        {"params": looked_up, **no_decay, LR_SCALE: EMBEDDING_SCALE},
        {"params": rest, **no_decay},
    ]
    return [heeding(muon), heeding(adamw([group for group in groups if group["params"]]))]


def whole_over_tensor_ranks(optimizer: Optimizer, *_: object) -> None:
    """Before a step of Muon, whose update is of a whole matrix: gradients that tensor ranks have in parts are gathered,
    so that their momentum is whole, and each rank takes its part of the update. Data ranks keep parts of the momentum,
    of which PyTorch makes the whole for the update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and TENSOR in (names := gradient.device_mesh.mesh_dim_names or ()):
                placements = list(gradient.placements)
                placements[names.index(TENSOR)] = Replicate()
                parameter.grad = gradient.redistribute(placements=placements)


def heeding(optimizer: Optimizer) -> Optimizer:
    """The optimizer, made to heed FOUND_INF where its kernel does not, as fused ones do."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        taking_back = TakingBack()
        optimizer.register_step_pre_hook(taking_back.keep)
        optimizer.register_step_post_hook(taking_back.choose)
    return optimizer


class TakingBack:
    """Takes back on the device what a step has done, by a choice between before and after; to ask the host would be to
    wait. It costs a copy of the optimizer's parameters and moments while it steps."""

    def __init__(self) -> None:
        self.skipped: Tensor | None = None
        self.before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def keep(self, optimizer: Optimizer, *_: object) -> None:
        self.skipped = vars(optimizer).pop(FOUND_INF, None)  # those that know it and cannot heed it refuse to step
        if self.skipped is not None:
            self.before = {tensor: tensor.clone() for tensor in written(optimizer)}

    @torch.no_grad()
    def choose(self, optimizer: Optimizer, *_: object) -> None:
        if self.skipped is None:
            return
        for tensor in written(optimizer):
            # state that this step has made was zero before it
            earlier = self.before[tensor] if tensor in self.before else torch.zeros_like(tensor)
            tensor.copy_(torch.where(self.skipped.to(tensor.device) > 0, earlier, tensor))
        self.before = {}


def written(optimizer: Optimizer) -> Iterator[Tensor]:
    """All tensors that a step writes to."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def peak_rate(config: Config) -> float:
    """config.learning_rate; where nobody gave one, the optimizer's at the width (docs/benchmarks.md).

    By an update of one size an entry, what a matrix makes of its input changes with the width under AdamW, whose
    entries point one way, and with its root under Muon, whose singular values are alike. So a rate that was tried at
    one width is divided by that at another (Yang et al. 2022, arXiv:2203.03466).
    """
    if config.learning_rate is not None:
        return config.learning_rate
    wider = (config.dim or GPTConfig.dim) / TRIED_AT
    return ADAMW_RATE / wider if config.optimizer == "adamw" else MUON_RATE / math.sqrt(wider)


@contextlib.contextmanager
def own_settings(optimizers: list[Optimizer]) -> Iterator[None]:
    """Around the loading of a checkpoint: its state comes in, but decay and betas stay what this run's flags say."""
    before = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    yield
    for optimizer, groups in zip(optimizers, before, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)


def learning_rate(step: float, total_steps: int, config: Config) -> float:
    """Learning rate of update `step` (from 0; between two where updates have changed their size).

    Cosine (Loshchilov & Hutter, arXiv:1608.03983) or warm-up - stable - decay (MiniCPM, arXiv:2404.06395).
    """
    peak = peak_rate(config)
    low = peak / 10 if config.min_lr is None else config.min_lr
    warmup = min(200, math.ceil(0.02 * total_steps)) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        left = (total_steps - step) / decay_steps
        return low + (peak - low) * min(1.0, left)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
