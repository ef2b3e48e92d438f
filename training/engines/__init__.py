"""How training is spread. One door, `build_engine`; what it returns is used by the loop without knowing which it is.

    engine = build_engine(model, config, device, dtype, world, weights)
    sums, weight = engine.forward_backward(micro_batches, objective)     sums over all micro-batches and ranks
    norm = engine.step(learning_rate)

Every rank calls every method at the same time.

    single      one process                                    everything whole
    ddp         PyTorch's DistributedDataParallel              everything whole on every rank
    fsdp        PyTorch's fully_shard                          parameters, gradients and optimizer state in parts
    deepspeed   DeepSpeed's ZeRO, stages 0 to 3                nothing / optimizer state / + gradients / + parameters
"""

import os
import warnings

import torch

from model import GPT
from training.config import Config
from training.distributed import World
from training.engines.single import SingleEngine, Weights


def engine_name(config: Config, world: World) -> str:
    """config.engine with auto resolved: ddp under torchrun, deepspeed under its launcher, else single.

    Raises ValueError for flags that contradict the engine.
    """
    name = config.engine
    if name == "auto":
        name = {None: "single", "torchrun": "ddp", "deepspeed": "deepspeed"}[world.launcher]  # type: ignore[assignment]
    if name == "single" and world.size > 1:
        raise ValueError(
            f"--engine single, but a launcher started {world.size} processes; leave --engine out, or start one process"
        )
    for flag, given, engines in (
        ("--hsdp", config.hsdp, ("fsdp",)),
        (f"--zero_stage {config.zero_stage}", config.zero_stage is not None, ("deepspeed",)),
        (f"--deepspeed_config {config.deepspeed_config}", config.deepspeed_config is not None, ("deepspeed",)),
        ("--offload cpu", config.offload == "cpu", ("fsdp", "deepspeed")),
        ("--offload nvme", config.offload == "nvme", ("deepspeed",)),
    ):
        if given and name not in engines:
            raise ValueError(
                f"{flag} is for --engine {' or '.join(engines)}, and the engine is {name}; give that engine, or leave the flag out"
            )
    return name


def build_engine(
    model: GPT,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    weights: Weights | None = None,
) -> SingleEngine:
    """The engine config.engine names. `weights` fill a model that stands on the meta device."""
    name = engine_name(config, world)
    # imported when asked for: DeepSpeed is an extra, and both take seconds
    if name == "ddp":
        from training.engines.ddp import DDPEngine as Engine
    elif name == "fsdp":
        from training.engines.fsdp import FSDPEngine as Engine  # type: ignore[assignment]
    elif name == "deepspeed":
        # before its import: DeepSpeed picks its accelerator then, and would look for a GPU even where --device is cpu
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
        try:
            from training.engines.deepspeed import DeepSpeedEngine as Engine  # type: ignore[assignment]
        except ModuleNotFoundError as missing:
            raise ValueError(
                f"--engine deepspeed needs a package that is not installed ({missing.name}): pip install -e '.[deepspeed]'"
            ) from None
    else:
        Engine = SingleEngine  # type: ignore[assignment,misc]
    return Engine(model, config, device, dtype, world, weights)
