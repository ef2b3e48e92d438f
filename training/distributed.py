"""Where this process stands among its peers: environment variables in, ranks and a process group out.

torchrun, `python -m torch.distributed.launch`, accelerate and the deepspeed launcher all set RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them there is one process.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FIRST_CONTACT = timedelta(seconds=120)  # for all ranks to meet; a missing one is an error then, not a silent hang
COLLECTIVE = timedelta(minutes=30)


@dataclass
class World:
    """This process's place."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "World":
        read = {key: int(os.environ.get(name, default)) for key, name, default in (
            ("rank", "RANK", 0), ("size", "WORLD_SIZE", 1), ("local_rank", "LOCAL_RANK", 0), ("local_size", "LOCAL_WORLD_SIZE", 1),
        )}  # fmt: skip
        return cls(**read)


def pick_device(name: str, world: World) -> torch.device:
    """auto: this rank's GPU, else Apple's, else the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available() and world.size == 1
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device is {name}, but this PyTorch ({torch.__version__}) sees no CUDA GPU; use --device cpu"
            )
        device = torch.device("cuda", world.local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {world.local_rank} wants {device}, but there are {torch.cuda.device_count()} GPUs; start fewer processes"
            )
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        # torchrun sets one thread a process, which leaves a single process on a big machine idle
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // world.local_size)
            if hasattr(os, "sched_getaffinity")
            else max(1, (os.cpu_count() or 1) // world.local_size)
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX on x86; without them bfloat16 is emulated, and slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def start(world: World, device: torch.device) -> None:
    """Meet the other ranks. Raises ValueError, within a bounded time, where one cannot be reached."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=FIRST_CONTACT)
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"rank {world.rank} of {world.size} could not meet the others at {address} within {FIRST_CONTACT.seconds} s ({first_line}); "
            "check that every node runs, the address and port, and the firewall"
        ) from None
    dist.distributed_c10d._set_pg_timeout(COLLECTIVE, dist.group.WORLD)


def check_agreement(values: dict[str, Any], world: World) -> None:
    """Raise ValueError on every rank where ranks hold different values (flags, data)."""
    if world.size == 1:
        return
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, values)
    for name in values:
        for rank, other in enumerate(everywhere):
            if other[name] != everywhere[0][name]:
                raise ValueError(
                    f"rank {rank} has {name} {other[name]!r} but rank 0 has {everywhere[0][name]!r}; start every node with the same command and data"
                )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
