"""Where this process stands among its peers: environment variables in, ranks and a process group out.

torchrun, `python -m torch.distributed.launch`, accelerate and the deepspeed launcher all set RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT; horovodrun has names of its own; without either there is one process. What
ranks tell each other outside the gradients (sums, any value, a barrier) is here too, and costs one process nothing.
"""

import importlib.util
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from dataset.cores import usable_cores

FIRST_CONTACT = 120.0  # seconds for all ranks to meet; a missing one is an error then, not a silent hang

TENSOR = "tp"  # the mesh's dimension of ranks that share matrices

PREPARATION = timedelta(hours=4)  # nodes may tokenize the same data for hours, one faster than another


T = TypeVar("T")


@dataclass
class World:
    """This process's place among all.

    tp ranks share the matrices of a stage, pp stages hold one model, and each such group of tp x pp ranks sees the same
    data. Tensor-parallel ranks are neighbours, since they have most to say to each other, and stages are farthest
    apart. Eight ranks with tp 2 and pp 2:

        rank        0  1  2  3  4  5  6  7
        stage       0  0  0  0  1  1  1  1
        data rank   0  0  1  1  0  0  1  1
        tensor rank 0  1  0  1  0  1  0  1
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # "torchrun" (or one that sets the same variables), "deepspeed", "horovodrun", None: started by hand
    launcher: str | None = None
    tp: int = 1
    pp: int = 1

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model between them."""
        return self.tp * self.pp

    @property
    def data_size(self) -> int:
        return self.size // self.model_size

    @property
    def data_rank(self) -> int:
        """This process's place among those that divide the data: what loader, loss scale and sums go by."""
        return self.rank // self.tp % self.data_size

    @property
    def stage_rank(self) -> int:
        """Its place among those that the blocks are divided among."""
        return self.rank // (self.tp * self.data_size)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tp

    @property
    def random_rank(self) -> int:
        """Whose random numbers it draws: data ranks and stages their own, and tensor ranks the same, since they drop
        out of what all of them hold."""
        return self.rank // self.tp

    @property
    def tells(self) -> bool:
        """Whether it is the one of those with the same data that speaks for them."""
        return self.stage_rank == 0 and self.tensor_rank == 0

    def mesh(self, device: torch.device, copy_a_node: bool = False) -> DeviceMesh:
        """All ranks by stage ("pp"), part of the data ("data") and tensor rank ("tp"), the first and the last where
        there are several. With `copy_a_node` the data ranks of a node are its "shard", and nodes "replicate" each
        other.

        Raises ValueError where nodes cannot hold whole copies.
        """
        dims = {"pp": self.pp, "data": self.data_size, TENSOR: self.tp}
        if copy_a_node:
            shard = self.parts(copy_a_node)
            dims = {"pp": self.pp, "replicate": self.data_size // shard, "shard": shard, TENSOR: self.tp}
        dims = {name: size for name, size in dims.items() if size > 1 or name not in ("pp", TENSOR)}
        return init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    def parts(self, copy_a_node: bool = False) -> int:
        """How many data ranks hold one copy of a stage between them: all of them, or those of a node.

        Raises ValueError where nodes cannot hold whole copies.
        """
        if not copy_a_node:
            return self.data_size
        within, left = divmod(min(self.local_size, self.tp * self.data_size), self.tp)
        if left or self.size % self.local_size or self.data_size % within:
            raise ValueError(
                f"--hsdp needs the same number of processes on every node, a multiple of --tp {self.tp}, and "
                f"stages of whole nodes; {self.size} processes in {self.pp} stages are not a multiple of the "
                f"{self.local_size} here; start others, or leave --hsdp out"
            )
        return within

    @classmethod
    def from_environment(cls, tp: int = 1, pp: int = 1) -> "World":
        """Raises ValueError where so many processes cannot be divided among tensor ranks and stages."""

        def read(default: int, *names: str) -> int:
            return int(next((os.environ[name] for name in names if name in os.environ), default))

        launchers = {"HOROVOD_RANK": "horovodrun", "CROSS_RANK": "deepspeed", "RANK": "torchrun"}
        world = cls(
            read(0, "HOROVOD_RANK", "RANK"),
            read(1, "HOROVOD_SIZE", "WORLD_SIZE"),
            read(0, "HOROVOD_LOCAL_RANK", "LOCAL_RANK"),
            read(1, "HOROVOD_LOCAL_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),  # the last is the deepspeed launcher's
            next((launcher for name, launcher in launchers.items() if name in os.environ), None),
            tp,
            pp,
        )
        if world.size % world.model_size:
            raise ValueError(
                f"--tp {tp} x --pp {pp} ranks hold one model between them, and the number of processes, {world.size}, "
                f"is no multiple of {tp * pp}; start {world.model_size} (torchrun --nproc_per_node {world.model_size}) "
                "or a multiple of it, or lower --tp or --pp"
            )
        return world


class Silence(threading.Thread):
    """Says that nothing was heard of the other ranks, while this process still can.

    gloo raises where a rank is gone, and the loop says what that means. On GPUs a rank waits for its card, and NCCL's
    watchdog ends the process from a thread of its own, which leaves Python no word. It counts from the start of a
    collective and this from the last one that came through, so that this is the earlier.
    """

    def __init__(self, limit: float):
        super().__init__(name="silence", daemon=True)
        self.limit, self.heard = limit, time.monotonic()

    def hear(self, moment: float | None = None) -> None:
        """All collectives begun before a moment (of time.monotonic; None: now) have come through."""
        self.heard = max(self.heard, time.monotonic() if moment is None else moment)

    def run(self) -> None:
        while (left := self.heard + self.limit - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))  # the limit may be another by then
        print(
            f"warning: rank {os.environ.get('RANK', '0')} has heard nothing of the other ranks for {self.limit:.0f} s; "
            "if it is ended now, one of them is gone or stuck (its own last lines say why): the newest checkpoint "
            "stands, and the same command goes on from it",
            file=sys.stderr,
            flush=True,
        )


SILENCE = Silence(PREPARATION.total_seconds())  # started with the first process group that uses NCCL


def restarted() -> bool:
    """Whether a launcher (torchrun --max_restarts) or Slurm (--requeue) has started this command again by itself."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


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
    if device.index is not None and world.local_size > 1:
        raise ValueError(
            f"--device {name} is one device, and {world.local_size} processes run on this node; give --device "
            f"{device.type}, and each takes its own (CUDA_VISIBLE_DEVICES says which they may choose from)"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device is {name}, but this PyTorch ({torch.__version__}) sees no CUDA GPU; use --device cpu"
            )
        device = torch.device("cuda", world.local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {world.local_rank} wants {device}, but there are {torch.cuda.device_count()} GPUs; "
                "start fewer processes"
            )
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        torch.set_num_threads(cpu_threads(world))
    return device


def cpu_threads(world: World) -> int:
    """Threads of this process: what OMP_NUM_THREADS says, else its share of the cores.

    A 1 under torchrun is nobody's wish: torchrun sets it where it is not set, which would leave cores idle.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a list has a number for each nested level
    if given.isdecimal() and int(given) and not (given == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return int(given)
    return max(1, usable_cores() // world.local_size)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def pick_to_answer(device: str, dtype: str, world: World | None = None) -> tuple[torch.device, torch.dtype]:
    """Where and how precisely a model answers that is not being trained: as above, but a CPU stays at float32 unless
    asked, so that its answers do not depend on which one it is."""
    found = pick_device(device, world or World())
    return found, pick_dtype("float32" if (dtype, found.type) == ("auto", "cpu") else dtype, found)


def use_tensor_cores(device: torch.device, dtype: torch.dtype) -> None:
    """Where float32 is asked for on a GPU, its matrix products go through the tensor cores, as TF32: float32's range
    and sums, 10 bits of mantissa in what is multiplied (as float16 has), at several times the speed. All else stays
    exact float32, and so does everything on a CPU."""
    if device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("high")


def pick_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile blocks; unasked where it pays and can work: on GPUs that Triton knows, with a C compiler."""
    if asked is not None:
        return asked
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 7:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    return importlib.util.find_spec("triton") is not None and compiler is not None


def cpu_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX on x86; without them bfloat16 is emulated, and slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def start(world: World, device: torch.device, seconds: float = FIRST_CONTACT) -> None:
    """Meet the other ranks, once a process. Raises ValueError, within about `seconds`, where one cannot be reached."""
    if dist.is_initialized():
        return
    # on GPUs gloo stands beside NCCL, for what is on the host: offloaded gradients and checkpoints being written
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.launcher is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    limit = timedelta(seconds=seconds)
    advice = "check that every node runs, the address and port, and the firewall"
    try:
        if world.launcher == "horovodrun":
            learn_address(world.rank, seconds)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if world.rank > 0:
            wait_for_listener(host, port, seconds)
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # this store is torchrun's and outlives a restart: what the ranks before wrote there leads to dead processes
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            # on several nodes that is not enough: each counts restarts, and remembers the store's address, for itself
            if world.size > world.local_size:
                advice += "; start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where nodes may come and go"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        if device.type == "cuda" and not SILENCE.is_alive():
            SILENCE.start()
        barrier(device)
    except KeyError as error:
        raise ValueError(
            f"RANK is set but {error.args[0]} is not; "
            "start with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"rank {world.rank} of {world.size} could not meet the others at {address} within {seconds:.0f} s "
            f"({first_line}); {advice}"
        ) from None
    set_timeout(PREPARATION)


def learn_address(rank: int, seconds: float) -> None:
    """horovodrun says where Horovod meets, and in its key-value server rank 0 says where PyTorch does. Raises OSError
    where it has not by then."""
    server = "http://{HOROVOD_GLOO_RENDEZVOUS_ADDR}:{HOROVOD_GLOO_RENDEZVOUS_PORT}".format_map(os.environ)
    entry, opener = f"{server}/torch/address", build_opener(ProxyHandler({}))  # no proxy stands between the nodes
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        address = f"{os.environ['HOROVOD_HOSTNAME']} {port}".encode()
        opener.open(Request(entry, address, method="PUT"), timeout=seconds).close()
    deadline = time.monotonic() + seconds
    while True:
        try:
            with opener.open(entry, timeout=seconds) as answer:
                os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = answer.read().decode().split()
            return
        except HTTPError as error:  # not there yet
            if error.code != 404 or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def wait_for_listener(host: str, port: int, seconds: float) -> None:
    """Raises OSError where nobody answers by then; torch's own wait is twice as long and prints pages of C++ frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def set_timeout(limit: timedelta) -> None:
    """How long a collective may wait for another rank, from here on, in all groups of ranks there are."""
    SILENCE.limit = limit.total_seconds()
    SILENCE.hear()
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(limit, group)


def sum_over_ranks(values: list[float], device: torch.device, group: dist.ProcessGroup | None = None) -> list[float]:
    """Sums over a group of ranks (None: all of them)."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    sums = total.tolist()
    SILENCE.hear()
    return sums


def host_group(seconds: float) -> dist.ProcessGroup | None:
    """All ranks, on the host and apart from the training's group, so that a thread may talk while training does.

    Two threads must never use one group at the same time: ranks would pair what belongs to different questions. Every
    rank makes its groups in the same order; None for one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def sending_group(groups: list[list[int]], seconds: float) -> dist.ProcessGroup:
    """This rank's one of several groups of ranks, for ranks that send each other something. Every rank makes all.

    gloo bounds the wait for what one rank sends to another by the limit that their group was made with, and
    `set_timeout` changes that of collectives alone: in a mesh's group it would be PyTorch's half an hour, or where that
    is all ranks, the first contact's.
    """
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=seconds))
    dist.distributed_c10d._set_pg_timeout(PREPARATION, group)
    return group


def sum_on_host(values: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sums over a `host_group`. It says nothing of the devices, so the silence that they are watched for goes on."""
    if group is None:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def gather(value: T) -> list[T]:
    """Any picklable value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    everywhere: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    SILENCE.hear()
    return everywhere


def barrier(device: torch.device) -> None:
    if dist.is_initialized():
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what led to it: a pipeline's schedule wraps whatever a stage raises into one of its own."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def lost_contact(error: BaseException) -> str | None:
    """What says that another rank is gone or silent, in words of gloo, NCCL, the store, Horovod: the first line,
    without the place in their code and their advice. None where nothing does."""
    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "recv", "peer")
    for each in causes(error):
        named = isinstance(each, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
        named = named or type(each).__name__ == "HorovodInternalError"  # of a package that few have
        if dist.is_initialized() and (named or ("gloo" in str(each) and any(word in str(each) for word in words))):
            first_line = (str(each) or type(each).__name__).splitlines()[0]
            return re.sub(r"^\[\S+\] |\. This is typically caused by .*", "", first_line)
    return None


def check_agreement(values: dict[str, object]) -> None:
    """Raise ValueError on every rank where ranks hold different values (flags, data)."""
    everywhere = gather(values)
    for name in values:
        for rank, other in enumerate(everywhere):
            if other[name] != everywhere[0][name]:
                raise ValueError(
                    f"rank {rank} has {name} {other[name]!r} but rank 0 has {everywhere[0][name]!r}; "
                    "start every node with the same command and data"
                )


def stop() -> None:
    SILENCE.limit = math.inf
    if dist.is_initialized():
        dist.destroy_process_group()
