"""Which way to split a model, on paper: all mixtures of tensor, pipeline and data ranks, what they hold, send and take.

python scripts/memory.py --plan --params 7e9 --gpus 64 --memory 80

    model     7.1 B parameters: dim 4096, 40 layers, 32 heads, 8 of keys
    tried     308 mixtures: 40 refused, 97 too large, 171 fit
    tp pp data  engine             schedule  k    checkpointing  GB held  ...  bubble  seconds
    ...
    torchrun --nnodes 8 --nproc_per_node 8 train_pretrain.py --dim 4096 ... --tp 2 --pp 4 ...

Nothing is run and no torch is imported. The formulas are scripts/split_paper.py's, the cluster scripts/scaling_paper.py's
(`RAILS`, with --node GPUs a node). Time ranks; what is held must leave a tenth of the memory free.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console
from rich.table import Table

from scripts.scaling_paper import GB, RAILS, SHAPES, Cluster, table
from scripts.split_paper import (
    SCHEDULES, SINGLE, ZERO_BUBBLE, Job, Memory, Mixture, Network, bubble, bytes_sent, memory, seconds, telling, traffic,
)  # fmt: skip

FREE = 0.1  # of a GPU's memory, for what formulas leave out
LEAST, MOST = 5e7, 2e12  # parameters that `shape_of` makes a shape for
MOST_GPUS = 1024
NAMED = 0.02  # a shape of scaling_paper serves parameters so near its own
HEAD = 128  # width of a head, by rule
ASPECT = 102.4  # dim / layers of scaling_paper's 7 B shape


class Asked(NamedTuple):
    params: float
    gpus: int
    memory: float  # bytes a GPU
    node: int = 8
    rows: int = 1  # of a micro-batch
    sequence: int = 4096
    update: int = 1024  # rows

    @property
    def cluster(self) -> Cluster:
        return RAILS._replace(node=self.node)


class Planned(NamedTuple):
    mix: Mixture
    micro_batches: int
    held: Memory  # of the rank that holds most
    sent: dict[str, float]  # bytes by the rank that sends most
    bubble: float
    seconds: float


@dataclass
class Plan:
    net: Network
    fits: list[Planned] = field(default_factory=list)  # the fastest first
    too_large: list[Planned] = field(default_factory=list)  # the smallest first
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def tried(self) -> int:
        return len(self.fits) + len(self.too_large) + self.refused.total()


def shape_of(params: float) -> tuple[Network, str]:
    """A network of about so many parameters, and where its shape is from: scaling_paper's, where one is within 2 %; else
    heads of 128 and 8 of keys, the shipped vocabulary, dim a multiple of 1,024, layers of 8, as deep for its width as
    the 7 B shape. So everything can be halved often."""
    for name, (dim, layers, heads, kv_heads) in SHAPES.items():
        net = Network(dim, layers, heads, kv_heads)
        if abs(net.parameters / params - 1) <= NAMED:
            return net, f"the {name} shape of scripts/scaling_paper.py"
    found = []
    for dim in range(1024, 65536, 1024):
        net = Network(dim, 1, dim // HEAD, 8)
        layers = max(8, 8 * round((params - net.vocab * dim) / net.block / 8))
        found.append(net._replace(layers=layers))
    return min(found, key=lambda net: misfit(net, params)), "by rule"


def misfit(net: Network, params: float) -> float:
    """How far a shape is from wanted parameters and from the 7 B shape's proportions, both as factors."""
    return 10 * abs(math.log(net.parameters / params)) + abs(math.log(net.dim / net.layers / ASPECT))


# All mixtures --------------------------------------------------------------------------------------------------------


def divisors(number: int, at_most: int) -> list[int]:
    return [each for each in range(1, min(number, at_most) + 1) if number % each == 0]


def mixtures(gpus: int, node: int) -> Iterator[Mixture]:
    """All that flags can say: tp within a node, and of what does not matter only one."""
    for tp in divisors(gpus, node):
        for pp in divisors(gpus // tp, gpus):
            data = gpus // tp // pp
            nodes = tp > 1 and node % tp == 0 or tp == 1
            several = nodes and 1 < node // tp < data
            for engine in ("ddp", *(("fsdp", "fsdp kept") if pp == 1 else ("fsdp kept",)), *(
                (("hsdp", "hsdp kept") if pp == 1 else ("hsdp kept",)) if several else ()
            )):
                for schedule, per_rank in schedules(pp):
                    for checkpointing in (False, True):
                        yield Mixture(tp, pp, data, engine, schedule, per_rank, checkpointing)


def schedules(pp: int) -> list[tuple[str, int]]:
    if pp == 1:
        return [("1f1b", 1)]
    return [(name, per_rank) for name in SCHEDULES for per_rank in ((1,) if name in SINGLE else (2,))]
