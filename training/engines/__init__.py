"""How training is spread. One door, `build_engine`; what it returns is used by the loop without knowing which it is.

    engine = build_engine(model, config, device, dtype, world)
    sums, weight = engine.forward_backward(micro_batches, objective)     sums over all micro-batches and ranks
    norm = engine.step(learning_rate)

Every rank calls every method at the same time.
"""

import torch

from model import GPT
from training.config import Config
from training.distributed import World
from training.engines.ddp import DDPEngine
from training.engines.single import SingleEngine


def build_engine(model: GPT, config: Config, device: torch.device, dtype: torch.dtype, world: World) -> SingleEngine:
    """The engine config.engine names; auto is ddp where a launcher started several processes."""
    name = config.engine if config.engine != "auto" else "ddp" if world.size > 1 else "single"
    if name == "single" and world.size > 1:
        raise ValueError(
            f"--engine single, but a launcher started {world.size} processes; leave --engine out, or start one process"
        )
    if name == "ddp" and world.size == 1 and not torch.distributed.is_initialized():
        raise ValueError("--engine ddp needs a launcher: torchrun --nproc_per_node N train_....py")
    engine = DDPEngine if name == "ddp" else SingleEngine
    return engine(model, config, device, dtype, world)
