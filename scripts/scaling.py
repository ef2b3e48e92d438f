"""What does an update send? An engine's flags in; its collectives out, counted, beside the formula; memory and seconds.

torchrun --nproc_per_node 2 scripts/scaling.py --dim 768 --n_layers 16 --engine fsdp --accumulation_steps 4
deepspeed --num_gpus 2 scripts/scaling.py --dim 768 --n_layers 16 --zero_stage 2
torchrun --nproc_per_node 2 scripts/scaling.py --pp 2 --pp_schedule zbv --accumulation_steps 4
python scripts/scaling.py --paper            Markdown: the same formulas for up to 1,024 GPUs (scripts/scaling_paper.py)

Random weights, rows of random tokens, nothing saved. Counted is every collective that rank 0 calls in one update of
--accumulation_steps micro-batches: its kind, type, ranks, calls, and bytes of the whole tensor (what is reduced, or
what is there once it is gathered). What a rank sends of it in a ring follows. "wire" is what all ranks together sent
over the loopback interface meanwhile, in bytes a rank: counted by Linux, headers and other programs' traffic included.

Under --tp or --pp the formula is scripts/split_paper.py's; in a pipeline a rank of every stage is counted, and "bubble"
is the share of time in which its ranks wait: by formula, by the order of their actions, and measured on a CPU
(scripts/bubble.py).

The flags are those of pretraining. --max_steps updates are timed, 3 unless told; the memory is scripts/memory.py's. The
optimizer is AdamW unless --optimizer says muon, for which fsdp and tensor ranks gather more than the formula counts.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.batch import Batch
from scripts import bubble, split_paper
from scripts.benchmark_clock import wait
from scripts.memory import measure, mixture, network, stage_of
from scripts.scaling_paper import Shape, formula, sent, tables
from scripts.split_plan import bubble_table, plan_tables
from training import NextToken, PretrainConfig, build_engine
from training.engines import Engine
from training.setup import run_stage, start_machine, starting_model

# operator -> kind, and which argument is the whole tensor (None: what is returned)
COLLECTIVES: dict[str, tuple[str, int | None]] = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.allreduce_coalesced_": ("all_reduce", 0),
    "c10d.allgather_": ("all_gather", 0),
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d.allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d.reduce_scatter_": ("reduce_scatter", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.reduce_": ("reduce", 0),
    "c10d.send": ("send", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.broadcast": ("broadcast", 0),
}
SILENT = {"c10d.barrier", "c10d.monitored_barrier_"}  # move no tensor
SILENT |= {"c10d.recv_"}  # of what is received, the sender tells
SILENT |= {"_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd"}


class Key(NamedTuple):
    kind: str
    dtype: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} over {self.ranks}"


class Counted(TorchDispatchMode):
    """Collectives called while this is entered, DDP's from C++ included, since they pass the dispatcher too.

    Raises KeyError for an operator of torch.distributed that COLLECTIVES does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()  # of whole tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # first it becomes plain tensors and the collectives between them
        name = str(function).rsplit(".", 1)[0]
        returned = function(*args, **(kwargs or {}))
        if name.split(".")[0] in ("c10d", "_c10d_functional") and name not in SILENT:
            kind, place = COLLECTIVES[name]
            whole = list(tensors(returned if place is None else args[place]))
            key = Key(kind, str(whole[0].dtype).split(".")[1], 2 if kind == "send" else ranks_of(args))
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.nbytes for tensor in whole)
        return returned


def tensors(nested: object) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for each in nested:
            yield from tensors(each)


def ranks_of(args: tuple) -> int:
    """Ranks of the group among a collective's arguments: an object, or behind all others its name."""
    for each in args:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            return dist.ProcessGroup.unbox(each).size()
    return dist.distributed_c10d._resolve_process_group(args[-1]).size()


def expected(engine: Engine, shape: Shape, config: PretrainConfig, batches: list[Batch]) -> Counter[Key]:
    """Bytes of whole tensors in an update of this rank by the formula, under the keys they are counted by."""
    world, micro_batches = engine.world, len(batches)
    width = engine.dtype.itemsize
    if world.model_size > 1:
        rows, sequence = batches[0].input_ids.shape
        mix, job = mixture(engine, config), split_paper.Job(rows, sequence, micro_batches)
        found = split_paper.traffic(network(engine.model.config), mix, job, world.stage_rank, world.local_size)
        # the two bytes of a type that blocks compute in are one of four on a CPU that has no other
        traffic = [each._replace(width=width) if each.width == split_paper.WIDTH else each for each in found]
        sizes = {each.group: split_paper.group_size(each.group, mix, world.local_size) for each in traffic}
    else:
        name = f"zero{stage_of(engine)}" if engine.name == "deepspeed" else "hsdp" if config.hsdp else engine.name
        traffic = formula(f"{name}{' kept' * getattr(engine, 'keeps', False)}", shape, width, world.local_size)
        sizes = {"world": world.size, "node": world.local_size, "nodes": world.size // world.local_size}
    dtypes = {4: "float32", width: str(engine.dtype).split(".")[1]}
    by_key: Counter[Key] = Counter()
    for each in traffic:
        size = each.width * each.numbers * each.times(micro_batches)
        by_key[Key(each.kind, dtypes[each.width], 2 if each.kind == "send" else sizes[each.group])] += round(size)
    return by_key


def on_the_wire() -> int:
    """Bytes that left through the loopback interface since the machine (or network namespace) started; 0: no Linux."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.is_file() else []
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


def update(engine: Engine, batches: list[Batch]) -> None:
    weight = float(engine.world.data_size * sum(batch.supervised for batch in batches))
    engine.forward_backward(batches, NextToken(), weight).read()
    engine.step(1e-4).read()


def synthetic(config: PretrainConfig, vocabulary: int, length: int) -> list[Batch]:
    """An update's micro-batches of this rank, one document a row."""
    rows, positions = config.batch_size, torch.arange(length).expand(config.batch_size, length)
    drawn = [torch.randint(vocabulary, (2, rows, length)) for _ in range(config.accumulation_steps)]
    return [Batch.of(ids, labels, positions, list(range(rows)), rows * length) for ids, labels in drawn]


def waits(engine: Engine, config: PretrainConfig, batches: list[Batch], updates: int) -> dict[str, float]:
    """Shares of a pipeline's time in which its ranks wait: by formula, by the order of their actions, and measured."""
    if config.pp == 1 or engine.device.type != "cpu":
        return {}
    found = []
    for _ in range(updates):
        actions: list[bubble.Action] = []
        engine.barrier()
        with bubble.recorded(actions):
            update(engine, batches)
        found.append(engine.gather(actions)[:: engine.world.size // config.pp])  # of the first rank of each stage
    return {"formula": split_paper.bubble(mixture(engine, config), len(batches)), **bubble.shares(found)._asdict()}


def timed(engine: Engine, batches: list[Batch]) -> float:
    engine.barrier()
    began = time.perf_counter()
    update(engine, batches)
    wait(engine.device)
    return time.perf_counter() - began


def count(engine: Engine, batches: list[Batch]) -> tuple[Counted, int]:
    """One update's collectives, and the bytes that all ranks sent meanwhile."""
    update(engine, batches)  # ZeRO-3 learns the order of modules in its first, DDP that of gradients
    engine.barrier()
    before = on_the_wire()
    with Counted() as counted:
        update(engine, batches)
    engine.barrier()
    return counted, on_the_wire() - before


def by_kind(counted: Counted, by_formula: Counter[Key]) -> dict[str, Any]:
    """A rank's calls and bytes, and what it sends of them."""
    keys = [*counted.bytes, *(key for key in by_formula if key not in counted.bytes)]
    return {
        "calls": {str(key): counted.calls[key] for key in keys},
        "bytes": {str(key): counted.bytes[key] for key in keys},
        "formula": {str(key): by_formula[key] for key in keys},
        "sent": sent_of(counted.bytes),
        "sent_by_formula": sent_of(by_formula),
    }


def sent_of(whole: Counter[Key]) -> int:
    """Bytes that a rank sends."""
    each = (size if key.kind == "send" else sent(key.kind, size, key.ranks) for key, size in whole.items())
    return round(sum(each))


def main(config: PretrainConfig) -> None:
    machine = start_machine(config)
    world = machine.world
    start = starting_model(replace(config, init_from="none", optimizer=config.optimizer or "adamw"))
    shape = Shape.of(start.model)
    engine = build_engine(start.model, start.config, machine, start.weights)
    memory = measure(engine, config.pp)
    batches = synthetic(config, start.model.config.vocab_size, start.max_seq_len)
    counted, wire = count(engine, batches)
    seconds = [timed(engine, batches) for _ in range(config.max_steps or 3)]
    waiting = waits(engine, config, batches, config.max_steps or 3)
    of_ranks = engine.gather(by_kind(counted, expected(engine, shape, config, batches)))
    result = {
        "engine": engine.name if engine.name != "deepspeed" else f"deepspeed ZeRO-{stage_of(engine)}",
        "ranks": world.size,
        "micro_batches": len(batches),
        "parameters": shape.total,
        **of_ranks[0],
        "stages": of_ranks[:: world.size // world.pp],  # the first rank of each
        "wire": wire // world.size,
        "memory": memory,
        "bubble": waiting,
        "seconds": {"least": min(seconds), "median": median(seconds)},
    }
    if world.rank == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if "--paper" in sys.argv:
        print(tables(), bubble_table(), plan_tables(), sep="\n\n")
    else:
        run_stage(main, PretrainConfig, __doc__)
