"""The one loop, objectives (what is optimised), engines (how it is spread), checkpoints, metrics and config."""

from typing import TYPE_CHECKING

from dataset.later import later
from training.command import run_stage
from training.config import load_config
from training.stages import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig

if TYPE_CHECKING:
    from training.engines import build_engine
    from training.loop import train
    from training.objectives import ALONE, DPO, GRPO, STAGES, BradleyTerry, Distillation, NextToken
else:  # they need torch, which takes a second to import; flags are checked without it
    __getattr__ = later(
        {
            "training.engines": ("build_engine",),
            "training.loop": ("train",),
            "training.objectives": ("ALONE", "DPO", "GRPO", "STAGES", "BradleyTerry", "Distillation", "NextToken"),
        }
    )

__all__ = [
    "ALONE",
    "DPO",
    "GRPO",
    "STAGES",
    "BradleyTerry",
    "DPOConfig",
    "DistillConfig",
    "Distillation",
    "GRPOConfig",
    "NextToken",
    "PPOConfig",
    "PretrainConfig",
    "RewardConfig",
    "SFTConfig",
    "build_engine",
    "load_config",
    "run_stage",
    "train",
]
