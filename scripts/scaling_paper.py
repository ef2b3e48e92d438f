"""What an update sends and holds, by formula, and what that means on a cluster: pure arithmetic, nothing is run.

    formula("fsdp", shape, width=2)                     [Traffic("all_gather", 2, numbers, ...), ...]
    holds("fsdp", shape, parts=8, micro_batches=1)      bytes a GPU
    seconds("fsdp", shape, cluster, 1024, 8192)         of an update of 8,192 tokens a GPU
    tables()                                            the Markdown of docs/scaling.md's last part

Volumes follow the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, section 7) for what this toolkit's engines
really do, which `scripts/scaling.py` counts. Bytes a rank sends are those of a ring: (R - 1) / R of the whole tensor in
a gather or reduce-scatter, twice that in an all-reduce (Patarasuk and Yuan 2009).
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:  # torch takes seconds to import, and scripts/split_plan.py needs none
    from model import GPT

RING = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "reduce": 1.0}
SMALL = 100_000  # elements; DeepSpeed's stage3_param_persistence_threshold
REUSED = 5e8  # parameters; half of its stage3_max_reuse_distance, which counts the way forward and back
DDP_BUCKET, ZERO_BUCKET = 25 * 2**20, 50_000_000  # bytes; elements
GB = 1e9


class Shape(NamedTuple):
    """Parameters of a model, as engines tell them apart."""

    blocks: int  # in all blocks together
    rest: int  # embedding, last norm, head
    n_blocks: int
    small: int  # in tensors that ZeRO-3 leaves whole on every rank

    @property
    def total(self) -> int:
        return self.blocks + self.rest

    @classmethod
    def of(cls, model: "GPT") -> Self:
        blocks = sum(parameter.numel() for block in model.blocks() for parameter in block.parameters())
        sizes = [parameter.numel() for parameter in model.parameters()]
        return cls(blocks, sum(sizes) - blocks, len(model.blocks()), sum(size for size in sizes if size <= SMALL))


class Traffic(NamedTuple):
    """One kind of message of an update."""

    kind: str  # a key of RING
    width: int  # bytes a number
    numbers: float  # elements of the whole tensor: what is reduced, or what is there once it is gathered
    phase: str  # "forward", "backward": beside its computation; "alone": everything waits for it
    every: bool = False  # in every micro-batch; else once an update, with the last one
    messages: int = 1  # that it goes in
    group: str = "world"  # "node": within each; "nodes": a rank with its peers on the others

    def times(self, micro_batches: int) -> int:
        return micro_batches if self.every else 1


def formula(engine: str, shape: Shape, width: int, parts: int = 1) -> list[Traffic]:
    """The Traffic of an update. width: bytes of the type that blocks compute in; parts: ranks of a node, of
    hsdp alone. "fsdp kept" and "hsdp kept" are those with --fsdp_reshard no.

    Left out are the few numbers of losses and norms. Raises KeyError for an engine that is not known.
    """
    n, blocks = shape.total, shape.n_blocks
    buckets = math.ceil(n / ZERO_BUCKET)
    again = shape.total > REUSED  # whether ZeRO-3 has dropped a parameter by the time it is wanted for the backward
    engine, _, kept = engine.partition(" ")
    group, every = ("node" if engine == "hsdp" else "world"), not kept
    known = {
        "single": [],
        "ddp": [Traffic("all_reduce", 4, n, "backward", messages=math.ceil(4 * n / DDP_BUCKET))],
        "zero0": [Traffic("all_reduce", 4, n, "alone")],
        "zero1": [Traffic("all_reduce", width, n, "alone", messages=buckets)],
        "zero2": [Traffic("all_reduce", width, n, "alone", True, buckets)],
        "zero3": [
            Traffic("all_gather", width, n - shape.small, "forward", True, blocks + 1),
            *([Traffic("all_gather", width, n - shape.small, "backward", True, blocks + 1)] if again else []),
            Traffic("reduce_scatter", width, n, "backward", True, buckets),
            Traffic("all_gather", width, shape.small, "alone"),
        ],
        "fsdp": [
            Traffic("all_gather", width, shape.blocks, "forward", every, blocks, group),
            Traffic("all_gather", 4, shape.rest, "forward", every, 1, group),
            *([] if kept else [Traffic("all_gather", width, shape.blocks, "backward", True, blocks, group)]),
            Traffic("reduce_scatter", 4, n, "backward", False, blocks + 1, group),
        ],
    }
    known["hsdp"] = [*known["fsdp"], Traffic("all_reduce", 4, n / parts, "backward", False, blocks + 1, "nodes")]
    for stage in ("zero1", "zero2"):
        known[stage].append(Traffic("all_gather", width, n, "alone", messages=buckets))
    return known[engine]


def sent(kind: str, size: float, ranks: int) -> float:
    """Bytes a rank sends for a whole tensor of so many, in a ring. Of a broadcast or a reduce: the ranks' mean."""
    return RING[kind] * (ranks - 1) / ranks * size


# On a cluster --------------------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    """Nodes of GPUs. Bandwidths in bytes a second and direction, a GPU's; hops in seconds."""

    name: str
    across: float  # this GPU's share of its node's network
    flops: float = 400e12  # a second that a GPU reaches in bfloat16
    node: int = 8
    inside: float = 450e9
    hop_inside: float = 3.4e-6  # NCCL's own figures (tuning.cc, protocol Simple: NVLink ring and network)
    hop_across: float = 14e-6


RAILS = Cluster("8 x 400 Gbit/s a node", 50e9)
ONE_NIC = Cluster("100 Gbit/s a node", 12.5e9 / 8)
SHAPES = {"0.1 B": (768, 16, 8, 2), "1 B": (2048, 22, 16, 4), "7 B": (4096, 40, 32, 8)}  # dim, layers, heads, kv heads
RANKS = (8, 64, 1024)
ENGINES = ("ddp", "fsdp", "fsdp kept", "hsdp", "zero1", "zero2", "zero3")
MEMORY = 80 * GB


@cache
def shape_named(name: str) -> Shape:
    import torch

    from model import GPT, GPTConfig

    dim, layers, heads, kv_heads = SHAPES[name]
    with torch.device("meta"):
        return Shape.of(GPT(GPTConfig(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads)))


def link(group: str, cluster: Cluster, ranks: int) -> tuple[int, float, float, float]:
    """Ranks of a group, bytes a second that each sends at, and the latency of a pass around the ring and of a tree.

    A ring over nodes leaves and enters each of them once in every one of its channels, and channels share a node's
    network cards between them: it goes at what a whole node has, not at one GPU's share. In "nodes" every GPU of a node
    has a ring of its own, and its share.
    """
    nodes = max(1, ranks // cluster.node)
    if group == "nodes":
        return circle(nodes, 1, cluster)
    return circle(min(ranks, cluster.node) if group == "node" else ranks, cluster.node, cluster)


def circle(size: int, a_node: int, cluster: Cluster) -> tuple[int, float, float, float]:
    """`link` of a group that has so many ranks in each of its nodes, while groups like it have the others."""
    if size <= a_node:
        return size, cluster.inside, (size - 1) * cluster.hop_inside, (size - 1) * cluster.hop_inside
    nodes = math.ceil(size / a_node)
    ring = (size - nodes) * cluster.hop_inside + (nodes - 1) * cluster.hop_across
    tree = (a_node - 1) * cluster.hop_inside + math.log2(nodes) * cluster.hop_across
    return size, min(cluster.inside, a_node * cluster.across), ring, tree


def transfer(traffic: Traffic, cluster: Cluster, ranks: int) -> float:
    """Seconds on the way."""
    return along(traffic, *link(traffic.group, cluster, ranks))


def along(traffic: Traffic, size: int, bandwidth: float, ring: float, tree: float) -> float:
    """Seconds on a link, by the alpha-beta model: messages x latency + bytes / bandwidth.

    NCCL sums small tensors along a tree, there and back; gathers and reduce-scatters it has as rings.
    """
    latency = 2 * min(ring, tree) if traffic.kind == "all_reduce" else ring
    return traffic.messages * latency + sent(traffic.kind, traffic.width * traffic.numbers, size) / bandwidth


def seconds(engine: str, shape: Shape, cluster: Cluster, ranks: int, tokens: float, micro_batches: int = 1) -> float:
    """Of an update: what moves beside a phase's computation costs what is left over, and the rest all of itself.

    tokens: of a micro-batch, a GPU. Computation is 2 N operations a token forward and 4 N backward.
    """
    traffic = formula(engine, shape, 2, parts=min(ranks, cluster.node))
    compute = {
        "forward": 2 * shape.total * tokens / cluster.flops,
        "backward": 4 * shape.total * tokens / cluster.flops,
    }
    took = 0.0
    for last in [False] * (micro_batches - 1) + [True]:
        now = [(each.phase, transfer(each, cluster, ranks)) for each in traffic if each.every or last]
        for phase, busy in (compute | {"alone": 0.0}).items():
            took += max(busy, sum(moving for of, moving in now if of == phase))
    return took


def used(engine: str, shape: Shape, cluster: Cluster, ranks: int, tokens: float, micro_batches: int = 1) -> float:
    """The share of an update's time in which a GPU computes."""
    computing = 6 * shape.total * tokens * micro_batches / cluster.flops
    return computing / seconds(engine, shape, cluster, ranks, tokens, micro_batches)


def tokens_for(share: float, engine: str, shape: Shape, cluster: Cluster, ranks: int) -> float:
    """The least tokens a GPU a micro-batch with which it computes for that share of the time; one micro-batch."""
    low, high = 1.0, 1e9
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if used(engine, shape, cluster, ranks, middle) >= share else (middle, high)
    return high


def holds(engine: str, shape: Shape, parts: int, micro_batches: int = 1) -> float:
    """Bytes a GPU in bfloat16: parameters, gradients, AdamW's moments, masters, and what is gathered at most; without
    activations. parts: ranks that a whole copy is divided among (of hsdp those of a node)."""
    n, block = shape.total, shape.blocks / shape.n_blocks
    summed = 2 if micro_batches == 1 else 4  # ZeRO adds up accumulated gradients in float32
    if engine == "ddp":
        return 16 * n + 2 * n  # autocast's 16-bit copies
    if engine.startswith(("fsdp", "hsdp")):
        gathered = 2 * (shape.blocks if "kept" in engine else 2 * block) + 4 * shape.rest
        gradients = 4 * (block + shape.rest) if micro_batches == 1 else 4 * n  # whole ones, between micro-batches
        return 16 * n / parts + gathered + gradients
    bucket = 2 * min(ZERO_BUCKET, n)
    if engine == "zero3":
        return (2 + summed + 12) * n / parts + 2 * min(n, 1e9) + bucket  # stage3_max_live_parameters
    shared = {"zero1": 1, "zero2": parts}[engine]
    return 2 * n + summed * n / shared + 12 * n / parts + bucket


# Tables --------------------------------------------------------------------------------------------------------------


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [[corner, *columns], ["---"] + ["--:"] * len(columns), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over_ranks(corner: str, cell: Callable[[str, Shape, int], str]) -> str:
    """A row an engine, a column a size and number of ranks."""
    shapes = {name: shape_named(name) for name in SHAPES}
    places = [(name, ranks) for name in SHAPES for ranks in RANKS]
    rows = {engine: [cell(engine, shapes[name], ranks) for name, ranks in places] for engine in ENGINES}
    return table(corner, [f"{name}, R = {ranks:,}" for name, ranks in places], rows)


def memory_cell(engine: str, shape: Shape, ranks: int) -> str:
    """One micro-batch, eight; in bold what a GPU has no room for."""
    parts = min(ranks, RAILS.node) if engine == "hsdp" else ranks
    sizes = sorted({round(holds(engine, shape, parts, k) / GB, 1) for k in (1, 8)})
    return ", ".join(f"{size:.1f}" if size <= MEMORY / GB else f"**{size:.1f}**" for size in sizes)


def bytes_sent(engine: str, shape: Shape, ranks: int, micro_batches: int, width: int = 2) -> float:
    """By a GPU, in an update."""
    return sum(
        each.times(micro_batches) * sent(each.kind, each.width * each.numbers, link(each.group, RAILS, ranks)[0])
        for each in formula(engine, shape, width, parts=min(ranks, RAILS.node))
    )


def bytes_table(ranks: int = 1024) -> str:
    places = [(name, k) for name in SHAPES for k in (1, 8)]
    rows = {
        engine: [f"{bytes_sent(engine, shape_named(name), ranks, k) / GB:.2f}" for name, k in places]
        for engine in ENGINES
    }
    return table("GB sent", [f"{name}, k = {k}" for name, k in places], rows)


def used_cell(engine: str, shape: Shape, ranks: int, cluster: Cluster, tokens: int) -> str:
    return f"{used(engine, shape, cluster, ranks, tokens):.0%}"


def tokens_cell(engine: str, shape: Shape, ranks: int, cluster: Cluster) -> str:
    return f"{tokens_for(0.9, engine, shape, cluster, ranks):,.0f}"


def tables() -> str:
    shapes = ", ".join(f"{name} is {shape_named(name).total:,}" for name in SHAPES)
    parts = [f"Parameters: {shapes}.", over_ranks("GB held", memory_cell), bytes_table()]
    for cluster in (RAILS, ONE_NIC):
        parts.append(f"{cluster.name}:")
        for tokens in (8192, 65536):
            parts.append(over_ranks(f"{tokens:,} tokens", partial(used_cell, cluster=cluster, tokens=tokens)))
        parts.append(over_ranks("tokens for 90 %", partial(tokens_cell, cluster=cluster)))
    return "\n\n".join(parts)
