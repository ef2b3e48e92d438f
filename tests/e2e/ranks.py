"""Run under a launcher by test_launchers: what two ranks must have in common, for every engine, as lines of JSON.

Three updates of three accumulated micro-batches, the second with a loss that is not a number on rank 1 alone. Printed:
the largest difference between what the ranks' networks answer (and the ones they generate with), how often gradients
travelled in an update, whether the bad update left no trace, and whether ZeRO-3's state comes back from a folder (the
argument).
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.batch import IGNORE, Batch
from model import GPT, GPTConfig
from training import NextToken, PretrainConfig, build_engine
from training.distributed import World, start
from training.engines import Engine, Machine
from training.engines.named_state import UniversalState

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero0": {"engine": "deepspeed", "zero_stage": 0},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero2 offload": {"engine": "deepspeed", "zero_stage": 2, "offload": "cpu"},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
}
ENGINES = {"horovod": {"engine": "horovod"}} if "HOROVOD_RANK" in os.environ else ENGINES
SHAPE = GPTConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=16)
world = World.from_environment()
device = torch.device("cpu")


class Poisoned(NextToken):
    """Not a number on rank 1."""

    def __call__(self, output: Any, batch: Any) -> Any:
        loss, sums = super().__call__(output, batch)
        return loss * (float("nan") if world.rank == 1 else 1.0), sums


class Reductions(TorchDispatchMode):
    """Counts the calls that sum gradients over ranks; the few numbers that ranks tell each other are not gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and any(word in name for word in ("allreduce", "reduce_scatter", "reduce_")):
            tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(t)]
            if max((t.numel() for t in tensors), default=0) > 100:
                self.calls[name.split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def micro_batches(update: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(10 * update + world.rank)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 50, (2, 16), generator=generator)
        batches.append(Batch.of(ids, ids.roll(-1, 1), torch.arange(16).expand(2, 16), [0, 1], 32))
    return batches


def question() -> Batch:
    """-log p of every token there is after the same 16, which no two networks agree on."""
    ids = torch.arange(16).expand(SHAPE.vocab_size, 16)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = torch.arange(SHAPE.vocab_size)
    return Batch.of(ids, labels, ids, [0], ids.numel())


def answers(engine: Engine) -> torch.Tensor:
    return engine.per_place(question()).nll


def difference_between_ranks(engine: Engine) -> float:
    low, high = answers(engine).clone(), answers(engine).clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return float((high - low).max())


def generators_difference(engine: Engine) -> float:
    """Between what the network answers and what the one to generate with does, on the worst rank."""
    batch, expected = question(), answers(engine)
    with engine.generator() as network, torch.no_grad():
        worst = (network(batch.input_ids, batch.position_ids, batch.labels) - expected).abs().max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def comes_back_by_name(engine: Any, folder: Path) -> bool:
    """The checkpoint of state that lives on a disk: a folder a parameter, read by any engine."""
    engine.save_by_name(folder)
    engine.barrier()
    state = UniversalState(folder)
    weights = engine.weights()
    parts = {name: state.read(name, weight.shape) for name, weight in weights.items()}
    equal = all(torch.equal(parts[name]["fp32"], weight) for name, weight in weights.items())
    return state.step == 2 and equal and all(bool(part["exp_avg_sq"].any()) for part in parts.values())


def keeps_its_settings(engine: Any, folder: Path) -> bool:
    """Whether decay and betas stay what this run's flags say when state saved with others is loaded."""

    def groups() -> list[dict[str, Any]]:
        return [group for optimizer in engine.optimizers for group in optimizer.param_groups]

    engine.save(folder, background=False)
    for group in groups():
        group |= {"weight_decay": 0.3, "betas": (0.7, 0.8)}
    engine.barrier()
    engine.load(folder)
    return all((group["weight_decay"], group["betas"]) == (0.3, (0.7, 0.8)) for group in groups())


def try_out(flags: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    config = PretrainConfig(dim=16, accumulation_steps=3, batch_size=2, optimizer="adamw", **flags)
    engine = build_engine(GPT(SHAPE), config, Machine(world, device, torch.float32))
    sent: Counter[Any] = Counter()  # by bucket, or name

    def counting_hook(state, bucket):  # DDP's reducer is C++ and calls nothing that can be watched
        sent[bucket.index()] += 1
        return allreduce_hook(state, bucket)

    if engine.name == "horovod":
        send = engine.horovod.allreduce_async_  # type: ignore[attr-defined]

        def counting_send(gradient, name, op):
            sent[name] += 1
            return send(gradient, name=name, op=op)

        engine.horovod.allreduce_async_ = counting_send  # type: ignore[attr-defined]
    if engine.name == "ddp":
        engine.network.register_comm_hook(None, counting_hook)  # type: ignore[operator]
    engine.forward_backward(micro_batches(0), NextToken())
    engine.step(1e-2)
    sent.clear()
    before = answers(engine)
    engine.forward_backward(micro_batches(1), Poisoned())
    norm = engine.step(1e-2).read()
    no_trace = bool(torch.equal(answers(engine), before)) and norm not in (0.0, 1.0) and not norm < float("inf")
    sent.clear()
    with Reductions() as reductions:
        sums = engine.forward_backward(micro_batches(2), NextToken()).read().sums
    good = engine.step(1e-2).read()
    moved = not torch.equal(answers(engine), before)
    kept = True
    if engine.name == "deepspeed" and engine.stage == 3:  # type: ignore[attr-defined]
        kept = comes_back_by_name(engine, Path(sys.argv[1]))
    return {
        "state by name": kept,
        "settings are its own": keeps_its_settings(engine, Path(f"{sys.argv[1]}-{'-'.join(map(str, flags.values()))}")),
        "difference": difference_between_ranks(engine),
        "generator's difference": generators_difference(engine),
        "reductions": max(sent.values()) if sent else sum(reductions.calls.values()),
        "kinds": dict(reductions.calls),
        "bad update left no trace": no_trace and moved and 0 < good < float("inf"),
        "loss": sums["loss"],
    }


start(world, device)
for name, flags in ENGINES.items():
    result = try_out(flags)
    if world.rank == 0:
        print(json.dumps({"engine": name} | result), flush=True)
dist.destroy_process_group()
