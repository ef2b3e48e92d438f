"""What one process and a split model both learn, kept a parameter at a time; as a script, the split half of it.

python tests/invariant/split.py FOLDER '[["tp2", "plain"], ["pp2 zb", "reward"], ["pp4", "plain"]]'

Ranks are copies of a process that has imported everything, which under a launcher each would do for itself.
Three updates of four micro-batches, whose supervised tokens differ, as those of data ranks do. The learning rate is
small for a reason: Adam's first updates are nearly the sign of a gradient, whatever its size, so where one is all
rounding the two models part by the whole rate. At 1e-3 that alone moves later gradients by 4e-5 of their norms, which
would hide what is looked for here; at 1e-4 it moves them by a few 1e-6.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dataset.batch import Batch
from dataset.loader import EMPTY_ROW, LabelledRows, PairRows, ScoredRows, TextRows
from model import GPT, GPTConfig
from model.adapters import Adapter, Bottleneck, LoRA, Prefix, begun
from model.gpt import fresh_weights
from tests.conftest import encoded
from tests.helpers import free_port
from training import DPO, NextToken, PretrainConfig, build_engine
from training.distributed import World, start, stop
from training.engines import Machine
from training.engines.pytorch import PyTorchEngine
from training.objectives import KTO, BradleyTerry
from training.split import ZERO_BUBBLE

UPDATES, MICRO_BATCHES = 3, 4
WIDTH, VOCABULARY, PAD = 32, 97, 3  # places of a row; a prime number, which no number of ranks divides
SHAPE = GPTConfig(
    vocab_size=VOCABULARY, dim=32, n_layers=4, n_heads=8, n_kv_heads=4, ffn_dim=48, max_seq_len=WIDTH,
    tie_embeddings=True,
)  # fmt: skip
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """A model, rows and what is optimised."""

    shape: dict[str, Any] = field(default_factory=dict)  # changes to SHAPE
    objective: str = "next token"
    adapter: Adapter | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    dtype: torch.dtype = torch.float32
    overflows: bool = False  # in the second update, on the first rank alone

    @property
    def config(self) -> GPTConfig:
        return replace(SHAPE, **self.shape)


ROWS = (0, 1, 40, 96)  # tokens whose rows are learnt, of the first rank's vocabulary and of the last one's
PROBLEMS = {
    "plain": Problem(),
    "untied, qk-norm, checkpointing": Problem(
        {"tie_embeddings": False, "qk_norm": True}, flags={"grad_checkpointing": True}
    ),
    # so far that gradients are no larger than Adam's epsilon: what it makes of them shows how far it was
    "clipped": Problem(flags={"grad_clip": 1e-6}, learning_rate=1e-2),
    "dpo": Problem(objective="dpo"),
    "kto, untied": Problem({"tie_embeddings": False}, "kto"),
    "reward": Problem({"scores": True}, "reward"),
    "lora": Problem(adapter=LoRA(rank=4, alpha=4.0, dora=True, tokens=ROWS)),
    "lora, untied, dpo": Problem({"tie_embeddings": False}, "dpo", LoRA(rank=4, alpha=4.0, tokens=ROWS)),
    "lora, reward": Problem({"scores": True}, "reward", LoRA(rank=4, alpha=4.0, scores=True, tokens=ROWS)),
    "bottleneck": Problem(adapter=Bottleneck(size=3, tokens=ROWS)),
    "prefix": Problem(adapter=Prefix(length=3)),
    # which multiplies in bfloat16, and makes more of rounding
    "muon": Problem(flags={"optimizer": "muon"}, learning_rate=1e-5),
}
UNTIED = {"tie_embeddings": False}  # so that no gradient that overflows is told from one end to the other by the tie
OPTIONS = {  # which change what is learnt, or how exactly
    "one micro-batch twice": Problem(objective="twice"),
    "dropout": Problem({"dropout": 0.1}),
    "lora, dropout": Problem(adapter=LoRA(rank=4, alpha=4.0, dropout=0.1, dora=True, tokens=ROWS)),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "float16": Problem(UNTIED, dtype=torch.float16, overflows=True),
    "compiled": Problem(flags={"compile": True}),
}


def problem_of(name: str, n_layers: int) -> Problem:
    problem = (PROBLEMS | OPTIONS)[name]
    return replace(problem, shape=problem.shape | {"n_layers": n_layers})


@dataclass(frozen=True)
class Split:
    """How many ranks, and their flags."""

    ranks: int
    engine: str = "fsdp"
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"
    nodes: int = 1  # several: what the data ranks of each have together is a whole copy (hsdp)

    @property
    def flags(self) -> dict[str, Any]:
        names = ("engine", "tp", "pp", "pp_schedule")
        return {name: getattr(self, name) for name in names} | {"hsdp": self.nodes > 1}

    @property
    def world(self) -> World:
        return replace(World.from_environment(self.tp, self.pp), local_size=self.ranks // self.nodes)

    @property
    def n_layers(self) -> int:
        """As many as there is something to see in: it is stages that want several."""
        return SHAPE.n_layers if self.pp > 1 else 2

    def takes(self, problem: Problem) -> bool:
        """The others are refused (training/split.py)."""
        if "compile" in problem.flags:
            return self.pp_schedule not in ZERO_BUBBLE
        return self.tp == 1 or not isinstance(problem.adapter, Prefix)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv")
SPLITS = {"tp2": Split(2, tp=2)}
SPLITS |= {f"pp2 {schedule}": Split(2, "ddp", pp=2, pp_schedule=schedule) for schedule in SCHEDULES}
SPLITS |= {f"pp2 {schedule}, fsdp": Split(2, pp=2, pp_schedule=schedule) for schedule in SCHEDULES[:3]}
SPLITS |= {f"pp2 {name} x ddp2": Split(4, "ddp", pp=2, pp_schedule=name) for name in ("1f1b", "zb", "zbv")}
SPLITS |= {f"pp2 {name} x fsdp2": Split(4, pp=2, pp_schedule=name) for name in ("1f1b", "interleaved")}
SPLITS |= {
    "pp4": Split(4, "ddp", pp=4),
    "tp4": Split(4, tp=4),
    "tp2 x fsdp2": Split(4, tp=2),
    "pp2 x tp2": Split(4, tp=2, pp=2),
    "tp2 x hsdp 2 x 2": Split(8, tp=2, nodes=2),
    "pp2 gpipe x hsdp 2 x 2": Split(8, pp=2, pp_schedule="gpipe", nodes=4),
    "pp2 x tp2 x fsdp2": Split(8, tp=2, pp=2),
    "pp2 interleaved x tp2 x fsdp2": Split(8, tp=2, pp=2, pp_schedule="interleaved"),
    "pp4 x tp2": Split(8, tp=2, pp=4),
}


# Rows -----------------------------------------------------------------------------------------------------------------


def tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(least, most))]


def text_rows(rng: random.Random) -> TextRows:
    """Conversations of which more or less is learnt."""
    documents = [tokens(rng, 6, WIDTH) for _ in range(120)]
    spans = [[rng.randint(1, len(ids) - 1), len(ids)] for ids in documents]
    return TextRows(encoded(ids=documents, spans=spans), WIDTH, PAD)


def pair_rows(rng: random.Random, kind: type[PairRows]) -> PairRows:
    prompts = [tokens(rng, 2, 5) for _ in range(120)]
    answered = [(prompt + tokens(rng, 1, 11), prompt + tokens(rng, 1, 11)) for prompt in prompts]
    if kind is LabelledRows:  # one of the two answers is missing
        answered = [(a, p) if i % 2 else (p, b) for i, (p, (a, b)) in enumerate(zip(prompts, answered, strict=True))]
    chosen, rejected = map(list, zip(*answered, strict=True))
    rows = kind(encoded(chosen=chosen, rejected=rejected, prompt=[len(p) for p in prompts]), WIDTH // 2, PAD)
    if kind is not ScoredRows:
        rows.reference = -torch.rand(rows.n_pairs, 2, generator=torch.Generator().manual_seed(3)).numpy() * 20
    if rows.beside is not None:
        rows.beside.reference = rows.reference
    return rows


class Twice(NextToken):
    """An error that losses do not show: one micro-batch in four counts twice in the gradient."""

    def __call__(self, output: Any, batch: Any) -> Any:
        loss, sums = super().__call__(output, batch)
        return loss * (2 if max(batch.row_ids) % (2 * MICRO_BATCHES) == 0 else 1), sums


def rows_and_objective(name: str) -> tuple[Any, Any]:
    rng = random.Random(7)
    kinds = {
        "dpo": (PairRows, DPO()),
        "kto": (LabelledRows, KTO(loss_type="kto")),
        "reward": (ScoredRows, BradleyTerry()),
    }
    if name in kinds:
        kind, objective = kinds[name]
        return pair_rows(rng, kind), objective
    return text_rows(rng), Twice() if name == "twice" else NextToken()


def micro_batches(rows: Any, update: int, world: World) -> list[Batch]:
    """This rank's of an update's, two rows each; in one of them one row is empty, as at the end of an epoch."""
    count = MICRO_BATCHES // world.data_size
    first = update * MICRO_BATCHES + world.data_rank * count
    numbers = [[2 * i, 2 * i + 1 if i % MICRO_BATCHES else EMPTY_ROW] for i in range(first, first + count)]
    return [rows.collate(pair) for pair in numbers]


# What is learnt -------------------------------------------------------------------------------------------------------


class Learnt(NamedTuple):
    losses: list[float]  # of updates
    norms: list[float]  # of their gradients, before clipping
    gradients: list[dict[str, Tensor]]  # of the parameters that this rank has a part of, whole
    held_out: float  # loss of other rows, afterwards
    weights: dict[str, Tensor]  # as they are exported: of rank 0
    scales: list[float]  # that losses were multiplied by
    copies: dict[str, Tensor]  # this rank's part of every parameter, by name and which part it is


def weights(problem: Problem) -> Iterator[tuple[str, Tensor]]:
    """Far from small first ones, norms and an adapter's too, so that a wrong use of any of them shows."""
    first = fresh_weights(problem.config, 1)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in first if problem.adapter is None else begun(first, problem.adapter, 1):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator)


def engine_of(problem: Problem, world: World, **flags: Any) -> PyTorchEngine:
    with torch.device("meta"):
        model = GPT(problem.config, problem.adapter)
    flags = {"batch_size": 2, "max_seq_len": WIDTH} | problem.flags | flags
    machine = Machine(world, CPU, problem.dtype)
    return cast(
        PyTorchEngine,
        build_engine(model, PretrainConfig(**{"optimizer": "adamw"} | flags), machine, partial(weights, problem)),
    )


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


def parts(model: GPT) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            dims = zip(parameter.placements, parameter.device_mesh.get_coordinate() or (), strict=True)
            name += "".join(f", part {place} of dimension {cut.dim}" for cut, place in dims if isinstance(cut, Shard))
            parameter = parameter.to_local()
        found[name] = parameter.detach().clone()
    return found


def overflow(learnt: Learnt, block: Any, inputs: Any, output: Tensor) -> None:
    """A gradient too large for its type, behind a block, in the second update."""
    if output.requires_grad and len(learnt.scales) == 1:
        output.register_hook(lambda gradient: gradient * torch.inf)


def learn(engine: PyTorchEngine, problem: Problem) -> Learnt:
    rows, objective = rows_and_objective(problem.objective)
    learnt = Learnt([], [], [], 0.0, {}, [], {})
    if problem.overflows and engine.world.rank == 0:
        engine.model.blocks()[0].register_forward_hook(partial(overflow, learnt))

    def measured(rows: Any, update: int) -> tuple[dict[str, float], float]:
        return engine.evaluate(micro_batches(rows, update, engine.world), objective)[:2]

    for update in range(UPDATES):
        told = objective.informed(partial(measured, rows.beside, update))
        totals = engine.forward_backward(micro_batches(rows, update, engine.world), told).read()
        learnt.losses.append(totals.sums["loss"] / totals.weight)
        learnt.gradients.append(gradients(engine.model))
        learnt.scales.append(engine.scaler.get_scale())
        learnt.norms.append(engine.step(problem.learning_rate).read())
    sums, weight = measured(rows, UPDATES)
    return learnt._replace(held_out=sums["loss"] / weight, weights=engine.weights(), copies=parts(engine.model))


def learn_alone(problem: Problem) -> Learnt:
    return learn(engine_of(problem, World(), engine="single", accumulation_steps=MICRO_BATCHES), problem)


def file_of(folder: Path, split: str, problem: str, rank: int) -> Path:
    return folder / f"{split}, {problem}, rank {rank}.pt"


def main(folder: str, meetings: str) -> None:
    by_ranks: dict[int, list[tuple[str, str]]] = {}
    for split, problem in json.loads(meetings):
        by_ranks.setdefault(SPLITS[split].ranks, []).append((split, problem))
    for ranks, theirs in by_ranks.items():
        torch.multiprocessing.start_processes(
            as_rank, (ranks, free_port(), Path(folder), theirs), ranks, start_method="fork"
        )


def as_rank(rank: int, ranks: int, port: int, folder: Path, meetings: list[tuple[str, str]]) -> None:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update(
        {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    PyTorchEngine.compiler = "aot_eager"  # graphs as ever, without the minutes in which they become machine code
    start(World.from_environment(), CPU)
    for split, name in meetings:
        asked = SPLITS[split]
        problem = problem_of(name, asked.n_layers)
        flags = asked.flags | {"accumulation_steps": MICRO_BATCHES // asked.world.data_size}
        learnt = learn(engine_of(problem, asked.world, **flags), problem)
        torch.save(tuple(learnt), file_of(folder, split, name, rank))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
