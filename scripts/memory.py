"""What does one rank hold? An engine's flags in; bytes of parameters, gradients, optimizer state and activations out.

torchrun --nproc_per_node 2 scripts/memory.py --dim 768 --n_layers 16 --engine fsdp
deepspeed --num_gpus 2 scripts/memory.py --dim 768 --n_layers 16 --zero_stage 2
torchrun --nproc_per_node 4 scripts/memory.py --dim 768 --n_layers 16 --engine fsdp --pp 2 --tp 2 --accumulation_steps 4
python scripts/memory.py --adapter lora
python scripts/memory.py --plan --params 7e9 --gpus 64 --memory 80     on paper: see scripts/split_plan.py

An update of short rows, random weights, nothing saved. The bytes are those of the live tensors of rank 0, and in a
pipeline of the first rank of every stage, each storage counted once: what the parameters stand on, what the optimizer
keeps, and what is there before the update and gone after it (gradients). Beside them the formula of the ZeRO paper
(Rajbhandari et al. 2020, arXiv:1910.02054, section 3) for this engine's number of copies, of what a rank of --tp and
--pp has of the model. Activations are what forward passes leave for backward passes at most, of a row a micro-batch;
beside them scripts/split_paper.py's formula, which is a GPU's in 16 bits: a CPU keeps a little else. Messages are
what stages tell each other, as long as a rank holds it.

The flags are those of pretraining. Shape, engine, precision, offload, --accumulation_steps and the adapter count; data,
rows and reporting do not. The formula is AdamW's, and so is the optimizer unless --optimizer says muon, which keeps one
number of a hidden matrix's parameter where AdamW keeps two.
"""

import contextlib
import gc
import json
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeGuard

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__" and "--plan" in sys.argv:  # on paper, before torch is imported
    from scripts.split_plan import main as on_paper

    sys.exit(on_paper())

import torch
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from dataset.batch import Batch
from model import GPT, GPTConfig
from model.adapters import begun
from scripts import split_paper
from training import NextToken, PretrainConfig, build_engine
from training.adapting import new_adapter
from training.config import Config
from training.division import stages_of
from training.engines import Engine
from training.engines.pipeline import cut, has_tied_head
from training.metrics import peak_memory_mb
from training.setup import Start, run_stage, start_machine, starting_model
from training.split import stages_per_rank

if TYPE_CHECKING:  # DeepSpeed is an extra
    from training.engines.deepspeed import ZeroEngine

Storages = dict[int, int]  # address -> bytes
STATE = ("parameters", "gradients", "optimizer")
LENGTH = 128  # tokens of a row of which activations are counted


class Looked(NamedTuple):
    """Bytes by part."""

    measured: dict[str, int]
    formula: dict[str, float]

    def show(self) -> None:
        rows: dict[str, tuple[int, float | None]] = {}
        for part, size in self.measured.items():
            if part == "activations":
                rows["state"] = sum(self.measured[each] for each in STATE), sum(self.formula[each] for each in STATE)
            rows[part] = size, self.formula.get(part)
        for part, (size, expected) in rows.items():
            beside = "" if expected is None else f"  formula {expected:>15,.0f}"
            print(f"  {part:<11} {size:>15,}{beside}")


def storages(tensors: Iterable[object]) -> Storages:
    """The storages of the dense tensors among these, of a DTensor its local part; anything else is passed over."""
    found: Storages = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a compiler's stand-in for a tensor has no storage
                found[storage.data_ptr()] = storage.nbytes()
    return found


def live(engine: Engine) -> Storages:
    """Every tensor Python can reach; gradients live in C++ until they are asked for."""
    kept = [parameter.grad for parameter in engine.model.parameters()]
    gc.collect()
    return storages([*kept, *(thing for thing in gc.get_objects() if isinstance(thing, Tensor))])


def parameters_of(engine: Engine) -> Storages:
    parts = [getattr(parameter, "ds_tensor", None) for parameter in engine.model.parameters()]  # ZeRO-3's own part
    return storages([*engine.model.parameters(), *parts])


def optimizer_of(engine: Engine) -> Storages:
    """Moments, and master copies where the optimizer works on other tensors than the model's."""
    tensors: list[object] = [shard for shard, _ in engine.shards()] if partitioned(engine) else []
    for optimizer in engine.optimizers:
        tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return storages(tensors)


def gradients_of(engine: Engine) -> Storages:
    """Those on the parameters, and ZeRO-3's buffer, which stays between updates."""
    buffer = getattr(engine.network.optimizer, "grad_partitions_flat_buffer", None) if partitioned(engine) else None
    return storages([buffer, *(parameter.grad for parameter in engine.model.parameters())])


def partitioned(engine: Engine) -> "TypeGuard[ZeroEngine]":
    """Whether its optimizer works on flat shards of the parameters."""
    return engine.name == "deepspeed" and stage_of(engine) > 0


def stage_of(engine: Engine) -> int:
    """The ZeRO stage an engine amounts to."""
    return {"single": 0, "ddp": 0, "fsdp": 3}.get(engine.name, getattr(engine, "stage", 0))


def short(rows: int, length: int = 16) -> Batch:
    ids = torch.arange(length).expand(rows, length)
    return Batch.of(ids, ids + 1, ids, row_ids=list(range(rows)), real_tokens=rows * length)


def measure(engine: Engine, micro_batches: int = 1) -> dict[str, int]:
    for _ in range(2):  # the first update makes the optimizer's state
        engine.forward_backward([short(1)] * micro_batches, NextToken())
        held = gradients_of(engine)
        before_step = live(engine)
        engine.step(1e-4)
    after_step = live(engine)
    parameters = parameters_of(engine)
    optimizer = {key: size for key, size in optimizer_of(engine).items() if key not in parameters}
    known = parameters.keys() | optimizer.keys()
    gradients = {k: v for k, v in before_step.items() if k not in known and (k in held or k not in after_step)}
    buffers = {k: v for k, v in after_step.items() if k not in known and k not in gradients}
    named = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, "buffers": buffers}
    return {name: sum(part.values()) for name, part in named.items()}


# Activations ---------------------------------------------------------------------------------------------------------


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """While this is entered: bytes of the storages that autograd keeps for backward passes, at most at a time."""

    def __init__(self) -> None:
        # given back as it is, a tensor would learn what made it, and never be dropped by what makes it
        super().__init__(self.keep, lambda kept: kept.tensor.detach())
        self.times: Counter[int] = Counter()  # by address, how often a storage is kept
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> "Kept":
        kept = Kept(tensor.detach())
        for address, size in storages([tensor]).items():
            if not self.times[address]:
                self.now += size
                self.most = max(self.most, self.now)
            self.times[address] += 1
            weakref.finalize(kept, self.drop, address, size)
        return kept

    def drop(self, address: int, size: int) -> None:
        self.times[address] -= 1
        if not self.times[address]:
            self.now -= size


@dataclass(eq=False)
class Kept:
    """What stands in a graph for a tensor, until its backward pass is over."""

    tensor: Tensor


class Messages:
    """While this is entered: bytes of what stages tell each other, at most at a time; of what is sent from when it was
    made, of a gradient that comes in from when there is room for it, until it is let go of."""

    methods = ("get_fwd_send_ops", "get_bwd_send_ops", "get_bwd_recv_ops")

    def __init__(self) -> None:
        self.most, self.known = 0, list[weakref.ref[Tensor]]()

    def __enter__(self) -> Self:
        self.before = {name: getattr(PipelineStage, name) for name in self.methods}
        for name, method in self.before.items():
            setattr(PipelineStage, name, self.watched(method, of_output=name == "get_fwd_send_ops"))
        return self

    def __exit__(self, *_: object) -> None:
        for name, method in self.before.items():
            setattr(PipelineStage, name, method)

    def watched(self, method: Callable[..., list[P2POp]], of_output: bool) -> Callable[..., list[P2POp]]:
        @wraps(method)
        def watching(stage: PipelineStage, micro_batch: int) -> list[P2POp]:
            ops = method(stage, micro_batch)
            outputs = stage.fwd_cache[micro_batch][0] if of_output else ()
            self.known += [weakref.ref(tensor) for tensor in (*outputs, *(op.tensor for op in ops))]
            self.most = max(self.most, sum(storages(known() for known in self.known).values()))
            return ops

        return watching


def activations(engine: Engine, micro_batches: int, length: int) -> tuple[int, int]:
    """Bytes of a row a micro-batch, and of what stages then tell each other. The former is what is kept of two rows
    each, less what is kept of one, so that weights and their 16-bit copies, which autograd keeps as well, are none."""
    most = []
    for rows in (1, 2):
        for _ in range(2):  # in the first stages say what they will send
            with (saved := Saved()), (told := Messages()):
                engine.forward_backward([short(rows, length)] * micro_batches, NextToken())
            engine.step(1e-4)
        most.append((saved.most, told.most))
    (one, messages), (two, _) = most
    return two - one, messages


# Formulas ------------------------------------------------------------------------------------------------------------


def share(model: GPT, config: Config, rank: int) -> tuple[int, int]:
    """Parameters that the ranks of a pipeline's place have, each of its tensor ranks, and those that are learnt.

    Blocks of its stages; the embedding at the first, norm and head at the last, where a tied head is an embedding too.
    Tensor ranks divide matrices, but for those of adapters and scores.
    """
    count = config.pp * stages_per_rank(config)
    stages = stages_of(rank, config.pp, config.pp_schedule, stages_per_rank(config))
    parts = cut(model.config, config.max_seq_len or model.config.max_seq_len, count)
    blocks, first, last = {block for stage in stages for block in parts[stage]}, 0 in stages, count - 1 in stages
    n = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        block = re.search(r"\.layers\.(\d+)\.", name)
        here = first or (last and has_tied_head(model)) if "embed_tokens" in name else last
        if int(block[1]) in blocks if block else here:
            divided = parameter.ndim == 2 and name.endswith(".weight") and not name.startswith("score")
            n[parameter.requires_grad] += parameter.numel() // (config.tp if divided else 1)
    return n[True] + n[False], n[True]


def network(shape: GPTConfig) -> split_paper.Network:
    return split_paper.Network(
        shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.vocab_size, shape.tie_embeddings
    )


def mixture(engine: Engine, config: Config) -> split_paper.Mixture:
    name = ("hsdp" if config.hsdp else engine.name) + " kept" * getattr(engine, "keeps", False)
    data, per_rank = engine.world.data_size, stages_per_rank(config)
    return split_paper.Mixture(
        config.tp, config.pp, data, name, config.pp_schedule, per_rank, config.grad_checkpointing
    )


def kept_by_formula(
    engine: Engine, config: Config, net: split_paper.Network, mix: split_paper.Mixture, job: split_paper.Job, rank: int
) -> float | None:
    """Of blocks and last norm, a row a micro-batch; None of what there is no formula for."""
    shape = engine.model.config
    if config.adapter or shape.qk_norm or net.ffn != shape.ffn_dim or engine.dtype == torch.float32:
        return None
    kept = split_paper.memory(net, mix._replace(engine="ddp"), job, rank).activations  # whichever it is
    # what a block computes again is there for its own backward pass alone, and not seen by the hooks
    return kept - job.tokens * split_paper.kept_by_block(net, mix.tp) if mix.checkpointing else kept


def formula(engine: Engine, shards: int, stage: int, n: int, learnt: int | None = None) -> dict[str, float]:
    """Bytes a rank by the paper: parameters, gradients and optimizer state, each divided by the ranks that share it.

    n: parameters; learnt: those of them that are, which alone have gradients and optimizer state (None: all).
    """
    learnt = n if learnt is None else learnt
    deepspeed = engine.name == "deepspeed"
    mixed = deepspeed and engine.dtype != torch.float32  # 16-bit parameters and gradients beside masters
    size = 2 if mixed else 4
    # Adam's two moments; DeepSpeed keeps a float32 master copy as well, in float32 too once it partitions
    optimizer = 8 + (4 if mixed or (deepspeed and stage) else 0)
    return {
        "parameters": size * n / (shards if stage >= 3 else 1),
        "gradients": size * learnt / (shards if stage >= 2 else 1),
        "optimizer": optimizer * learnt / (shards if stage >= 1 else 1),
    }


def adapted(start: Start[PretrainConfig], config: PretrainConfig) -> Start[PretrainConfig]:
    """With the adapter that flags ask for, on random weights, which training would refuse."""
    if config.adapter is None:
        return start
    adapter, plain = new_adapter(config, "none", start.tokenizer), start.weights
    with torch.device("meta"):
        model = GPT(start.model.config, adapter)
    return replace(start, model=model, weights=lambda: begun(plain(), adapter, config.seed))


def look(engine: Engine, start: Start[PretrainConfig], rank: int, micro_batches: int) -> Looked:
    """What a rank of the pipeline holds, and what it should."""
    config, world = start.config, engine.world
    length = min(LENGTH, start.max_seq_len)
    measured = measure(engine, micro_batches)
    measured["activations"], measured["messages"] = activations(engine, micro_batches, length)
    expected = formula(engine, world.parts(config.hsdp), stage_of(engine), *share(start.model, config, rank))
    net, mix = network(engine.model.config), mixture(engine, config)
    job = split_paper.Job(1, length, micro_batches)
    expected["messages"] = split_paper.messages(net, mix, job, rank)
    kept = kept_by_formula(engine, config, net, mix, job, rank)
    return Looked(measured, expected if kept is None else {**expected, "activations": kept})


def main(config: PretrainConfig) -> None:
    machine = start_machine(config)
    world = machine.world
    plain = replace(config, init_from="none", adapter=None, optimizer=config.optimizer or "adamw")
    start = adapted(starting_model(plain), config)
    n, learnt = start.model.num_parameters(), start.model.num_parameters(learnt=True)
    engine = build_engine(start.model, start.config, machine, start.weights)
    micro_batches = max(config.accumulation_steps, config.pp)
    everywhere = engine.gather(look(engine, start, world.stage_rank, micro_batches))
    if world.rank == 0:
        name = engine.name if engine.name != "deepspeed" else f"deepspeed ZeRO-{stage_of(engine)}"
        dtype = str(machine.dtype).split(".")[1]
        print(
            f"{name}, {world.size} ranks (--tp {world.tp}, --pp {world.pp}), {n:,} parameters, {learnt:,} learnt, "
            f"{dtype}, {micro_batches} micro-batches:"
        )
        stages = everywhere[:: world.size // world.pp]  # the first rank of each
        for place, found in enumerate(stages):
            print(f"bytes on rank {place * world.size // world.pp}:")
            found.show()
        said = {"engine": name, "ranks": world.size, "micro_batches": micro_batches, **stages[0]._asdict()}
        print(json.dumps({**said, "stages": [found._asdict() for found in stages]}))
        print(f"  peak memory of the process {peak_memory_mb(engine.device):,.0f} MB")


if __name__ == "__main__":
    run_stage(main, PretrainConfig, __doc__)
