"""The one loop, objectives (what is optimised), engines (how it is spread), checkpoints, metrics and config."""

from training.config import DPOConfig, PretrainConfig, SFTConfig, load_config
from training.engines import build_engine
from training.loop import train
from training.objectives import DPO, NextToken

__all__ = ["DPO", "DPOConfig", "NextToken", "PretrainConfig", "SFTConfig", "build_engine", "load_config", "train"]
