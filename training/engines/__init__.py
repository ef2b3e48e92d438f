"""How training is spread. One door, `build_engine`; what it returns is used by the loop without knowing which it is.

engine = build_engine(model, config, machine, weights)       the contract: training/engines/contract.py

single      one process                                    everything whole
ddp         PyTorch's DistributedDataParallel              everything whole on every rank
fsdp        PyTorch's fully_shard                          parameters, gradients and optimizer state in parts
deepspeed   DeepSpeed's ZeRO, stages 0 to 3                nothing / optimizer state / + gradients / + parameters
horovod     Horovod's all-reduce                           everything whole on every rank

With --pp, ddp and fsdp spread every stage of a pipeline (pipeline.py); with --tp, fsdp also cuts the matrices
themselves (tensor_parallel.py). What is refused stands in training/split.py.
"""

import os
import warnings
from dataclasses import replace
from typing import Literal

from model import GPT
from training.config import Config
from training.distributed import World
from training.engines.contract import Engine, Machine, Totals, Weights
from training.engines.pytorch import SingleEngine
from training.split import check_flags, check_shape

__all__ = ["Engine", "Machine", "SingleEngine", "Totals", "Weights", "build_engine", "engine_name", "optimizer_name"]


def engine_name(config: Config, world: World) -> str:
    """config.engine with auto resolved: ddp under torchrun, deepspeed and horovod under their launchers, else single.

    Raises ValueError for flags that contradict the engine.
    """
    torchrun = "ddp" if config.tp == 1 else "fsdp"
    by_launcher = {None: "single", "torchrun": torchrun, "deepspeed": "deepspeed", "horovodrun": "horovod"}
    name = by_launcher[world.launcher] if config.engine == "auto" else config.engine
    if name == "single" and world.size > 1:
        raise ValueError(
            f"--engine single, but a launcher started {world.size} processes; leave --engine out, or start one process"
        )
    if name == "horovod" and world.launcher not in ("horovodrun", None):
        raise ValueError(f"--engine horovod under {world.launcher}: start it with horovodrun --gloo -np {world.size}")
    for flag, given, engines in (
        ("--hsdp", config.hsdp, ("fsdp",)),
        (f"--tp {config.tp}", config.tp > 1, ("fsdp",)),
        (f"--pp {config.pp}", config.pp > 1, ("ddp", "fsdp")),
        ("--fsdp_reshard", config.fsdp_reshard is not None, ("fsdp",)),
        (f"--zero_stage {config.zero_stage}", config.zero_stage is not None, ("deepspeed",)),
        (f"--deepspeed_config {config.deepspeed_config}", config.deepspeed_config is not None, ("deepspeed",)),
        ("--offload cpu", config.offload == "cpu", ("fsdp", "deepspeed")),
        ("--offload nvme", config.offload == "nvme", ("deepspeed",)),
    ):
        if given and name not in engines:
            raise ValueError(
                f"{flag} is for --engine {' or '.join(engines)}, and the engine is {name}; "
                "give that engine, or leave the flag out"
            )
    check_flags(config, name)
    return name


def optimizer_name(config: Config, world: World) -> Literal["adamw", "muon"]:
    """config.optimizer, or what stands for it where nobody gave one: Muon where whole matrices are there for it."""
    whole = engine_name(config, world) != "deepspeed" and config.adapter is None
    return config.optimizer or ("muon" if whole else "adamw")


def build_engine(model: GPT, config: Config, machine: Machine, weights: Weights | None = None) -> Engine:
    """The engine config.engine names. `weights` fill a model that stands on the meta device."""
    name = engine_name(config, machine.world)
    config = replace(config, optimizer=optimizer_name(config, machine.world))
    check_shape(config, model.config, machine.world.parts(config.hsdp))
    # imported when asked for: DeepSpeed is an extra, and both take seconds
    if config.pp > 1:
        from training.engines.pipeline import PIPELINES

        return PIPELINES[name](model, config, machine, weights)
    if name == "ddp":
        from training.engines.ddp import DDPEngine

        return DDPEngine(model, config, machine, weights)
    if name == "fsdp":
        from training.engines.fsdp import FSDPEngine

        return FSDPEngine(model, config, machine, weights)
    if name == "horovod":
        from training.engines.horovod import HorovodEngine

        return HorovodEngine(model, config, machine, weights)
    if name == "deepspeed":
        # before its import: DeepSpeed picks its accelerator then, and would look for a GPU even where --device is cpu
        os.environ.setdefault("DS_ACCELERATOR", machine.device.type)
        warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
        try:
            from training.engines.deepspeed import deepspeed_engine
        except ModuleNotFoundError as missing:
            raise ValueError(
                f"--engine deepspeed needs a package that is not installed ({missing.name}): "
                "pip install -e '.[deepspeed]'"
            ) from None
        return deepspeed_engine(model, config, machine, weights)
    return SingleEngine(model, config, machine, weights)
