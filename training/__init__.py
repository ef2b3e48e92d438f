"""The one loop, objectives (what is optimised), engines (how it is spread), checkpoints, metrics and config."""

from training.config import load_config
from training.engines import build_engine
from training.loop import train
from training.objectives import DPO, STAGES, DPOConfig, NextToken, PretrainConfig, SFTConfig

__all__ = [
    "DPO",
    "STAGES",
    "DPOConfig",
    "NextToken",
    "PretrainConfig",
    "SFTConfig",
    "build_engine",
    "load_config",
    "train",
]
