"""Which way to split a model, on paper: all mixtures of tensor, pipeline and data ranks, what they hold, send and take.

python scripts/memory.py --plan --params 7e9 --gpus 64 --memory 80

    7.08 B parameters, the 7 B shape of scripts/scaling_paper.py: dim 4,096, 40 layers, 32 heads, 8 of keys; ...
    456 mixtures: 117 fit into 90% of the memory, 83 do not, 256 are left out: ...
    tp x pp x data  engine     schedule     k   checkpointing  GB held  ...  bubble  computes  seconds
    1 x 1 x 64      fsdp       -            16  no                66.8  ...    0.0%      100%     8.28
    1 x 2 x 32      fsdp kept  1f1b         32  no                58.7  ...    3.0%       96%     8.63
    torchrun --nnodes 8 --rdzv_backend c10d ... --engine fsdp --tp 1 --pp 1 --fsdp_reshard yes

Nothing is run and no torch is imported. The formulas are scripts/split_paper.py's, the cluster scaling_paper's RAILS
(with --node GPUs a node). Time ranks; a tenth of the memory is left free. "kept" is --fsdp_reshard no; "computes" is
the share of the time in which operations are made that an update has, those of checkpointing not among them.
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
    SCHEDULES,
    SINGLE,
    ZERO_BUBBLE,
    Job,
    Memory,
    Mixture,
    Network,
    bubble,
    bytes_sent,
    memory,
    seconds,
    telling,
    traffic,
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
    """A network of about so many parameters, and where its shape is from: scaling_paper's where one is within 2 %; else
    heads of 128 and 8 of keys, the shipped vocabulary, dim a multiple of 1,024, layers of 8, about as deep for its
    width as the 7 B shape. So all of it can be halved often."""
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
    """All that the flags can say, tp within a node; and of what differs in nothing only one: under a pipeline
    --fsdp_reshard yes holds no less than "no" and sends more, hsdp within one node is fsdp, and of one data rank fsdp
    divides nothing, which is what tp needs it for."""
    for tp in divisors(math.gcd(node, gpus), gpus):
        for pp in divisors(gpus // tp, gpus):
            data = gpus // tp // pp
            for engine in engines(tp, pp, data, node):
                for schedule in SCHEDULES if pp > 1 else ("1f1b",):
                    for checkpointing in (False, True):
                        yield Mixture(tp, pp, data, engine, schedule, 1 if schedule in SINGLE else 2, checkpointing)


def engines(tp: int, pp: int, data: int, node: int) -> list[str]:
    parts = ["fsdp", *(["hsdp"] if 1 < node // tp < data and data % (node // tp) == 0 else [])]
    return ["ddp", *([] if pp > 1 else parts), *(f"{each} kept" for each in parts)]


def refusal(mix: Mixture, net: Network, asked: Asked) -> str | None:
    """Why a mixture cannot be, or None. The first six are training/split.py's; the others are what plans leave out."""
    k, left = divmod(asked.update, asked.rows * mix.data)
    whole = max(1, k // mix.pp)  # rounds of interleaved stages
    divided = {"heads": net.heads, "heads of keys": net.kv_heads, "ffn": net.ffn, "sequence": asked.sequence}
    reasons = {
        "tp is for fsdp": mix.tp > 1 and mix.engine == "ddp",
        "tp divides heads, heads of keys, ffn and sequence": any(number % mix.tp for number in divided.values()),
        "a stage has a layer at least": mix.stages > net.layers,
        "zb and zbv are for ddp without tp": mix.schedule in ZERO_BUBBLE and (mix.tp > 1 or mix.engine != "ddp"),
        "1f1b takes as many micro-batches as stages": mix.pp > 1 and mix.schedule == "1f1b" and k < mix.pp,
        "interleaved and zb take whole rounds": mix.schedule in ("interleaved", "zb") and (k < mix.pp or k % whole > 0),
        "rows an update divide among data ranks": left > 0 or k == 0,
        "zb and zbv keep what checkpointing would free": mix.schedule in ZERO_BUBBLE and mix.checkpointing,
    }
    return next((reason for reason, true in reasons.items() if true), None)


def plan(asked: Asked) -> Plan:
    """Every mixture, judged. Raises ValueError for numbers that make no sense."""
    check(asked)
    found = Plan(shape_of(asked.params)[0])
    for mix in mixtures(asked.gpus, asked.node):
        reason = refusal(mix, found.net, asked)
        if reason is not None:
            found.refused[reason] += 1
            continue
        judged = judge(mix, found.net, asked)
        large = judged.held.total > (1 - FREE) * asked.memory
        (found.too_large if large else found.fits).append(judged)
    found.fits.sort(key=lambda each: (each.seconds, each.held.total))
    found.too_large.sort(key=lambda each: each.held.total)
    return found


def judge(mix: Mixture, net: Network, asked: Asked) -> Planned:
    job = Job(asked.rows, asked.sequence, asked.update // (asked.rows * mix.data))
    ranks, node = telling(mix), asked.node
    held = max((memory(net, mix, job, rank, node) for rank in ranks), key=lambda each: each.total)
    sent = [bytes_sent(traffic(net, mix, job, rank, node), mix, job, node) for rank in ranks]
    most = max(sent, key=lambda kinds: sum(kinds.values()))
    took = seconds(net, mix, job, asked.cluster)
    return Planned(mix, job.micro_batches, held, most, bubble(mix, job.micro_batches), took)


def check(asked: Asked) -> None:
    """Raise ValueError for numbers that make no sense."""
    whole = {"gpus": asked.gpus, "node": asked.node, "rows": asked.rows, "seq": asked.sequence, "update": asked.update}
    for name, value in whole.items():
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if not LEAST <= asked.params <= MOST:
        raise ValueError(f"--params is {asked.params:g}; plans are for {LEAST:g} to {MOST:g} parameters, as in 7e9")
    if not 0 < asked.memory < math.inf:
        raise ValueError(f"--memory is {asked.memory / GB:g}; it must be a GPU's memory in GB, as in 80")
    if asked.gpus > MOST_GPUS:
        raise ValueError(f"--gpus is {asked.gpus:,}; the formulas are for up to {MOST_GPUS:,}")
    if asked.gpus > asked.node and asked.gpus % asked.node:
        raise ValueError(
            f"--gpus {asked.gpus} are no whole nodes of {asked.node}; give a multiple of {asked.node}, or --node"
        )


# What is shown -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "tp x pp x data", "engine", "schedule", "k", "checkpointing", "GB held", "state", "activations", "messages",
    "GB sent", "by tp", "by pp", "by data", "bubble", "computes", "seconds",
)  # fmt: skip
HEADERS = {  # of those that are not simply a word a line
    COLUMNS[0]: COLUMNS[0], "checkpointing": "check-\npointing", "activations": "activ-\nations",
    "messages": "mes-\nsages",
}  # fmt: skip
WIDE = 160  # characters that the table has, whatever the terminal's width


def cells(each: Planned, net: Network, asked: Asked) -> list[str]:
    mix, held, sent = each.mix, each.held, each.sent
    made = [held.total, held.state, held.activations + held.head, held.messages, sum(sent.values()), *sent.values()]
    return [
        f"{mix.tp} x {mix.pp} x {mix.data}", mix.engine, mix.schedule if mix.pp > 1 else "-", f"{each.micro_batches:,}",
        "yes" if mix.checkpointing else "no", *(f"{size / GB:,.1f}" for size in made),
        f"{each.bubble:.1%}", f"{useful(each, net, asked):.0%}", f"{each.seconds:.2f}",
    ]  # fmt: skip


def useful(each: Planned, net: Network, asked: Asked) -> float:
    """The share of the time that goes into an update's own operations, without what is computed again."""
    block, head = net.operations(asked.sequence)
    operations = (net.layers * block + head) * asked.update * asked.sequence
    return operations / asked.gpus / asked.cluster.flops / each.seconds


def command(each: Planned, net: Network, asked: Asked) -> str:
    """The line that starts it, the same on every node."""
    mix, engine = each.mix, each.mix.engine.split()[0]
    nodes = max(1, asked.gpus // asked.node)
    flags = {
        "dim": net.dim, "n_layers": net.layers, "n_heads": net.heads, "n_kv_heads": net.kv_heads,
        "max_seq_len": asked.sequence, "batch_size": asked.rows, "global_batch_size": asked.update, "dtype": "bfloat16",
        "engine": "fsdp" if engine == "hsdp" else engine, "tp": mix.tp, "pp": mix.pp,
    }  # fmt: skip
    if mix.pp > 1:
        flags |= {"pp_schedule": mix.schedule}
    if engine != "ddp":
        flags |= {"fsdp_reshard": "no" if mix.engine.endswith(" kept") else "yes"}
    said = [f"--{name} {value}" for name, value in flags.items()]
    said += [f"--{name}" for name, on in (("hsdp", engine == "hsdp"), ("grad_checkpointing", mix.checkpointing)) if on]
    ranks = min(asked.gpus, asked.node)
    where = f" --nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29400" if nodes > 1 else ""
    return f"torchrun{where} --nproc_per_node {ranks} train_pretrain.py {' '.join(said)}"


def show(found: Plan, asked: Asked, top: int, console: Console) -> None:
    for line in said_first(found, asked):
        console.print(line, highlight=False, soft_wrap=True)
    shown = found.fits[:top] or found.too_large[:1]
    title = None if found.fits else "nothing fits; the smallest"
    lines = Table(title=title, caption="GB are 10^9 bytes of the rank that has most; kept: --fsdp_reshard no")
    for name in COLUMNS:
        lines.add_column(
            HEADERS.get(name, name.replace(" ", "\n")),
            justify="left" if name in ("engine", "schedule") else "right",
            no_wrap=True,
        )
    for each in shown:
        lines.add_row(*cells(each, found.net, asked))
    if shown:
        console.print(lines)
    last = "give more GPUs, a shorter --seq, fewer --rows, or a smaller model"
    if not shown:
        last = "no mixture can be; an --update of a power of 2, of no fewer --rows than GPUs, leaves most"
    console.print(command(found.fits[0], found.net, asked) if found.fits else last, highlight=False, soft_wrap=True)


def said_first(found: Plan, asked: Asked) -> list[str]:
    net = found.net
    return [
        f"{net.parameters / 1e9:.2f} B parameters, {shape_of(asked.params)[1]}: dim {net.dim:,}, {net.layers} layers, "
        f"{net.heads} heads, {net.kv_heads} of keys; vocabulary {net.vocab:,}, tied",
        f"{asked.gpus:,} GPUs of {asked.memory / GB:g} GB, {min(asked.node, asked.gpus)} a node, each with a card of "
        f"{8 * RAILS.across / GB:.0f} Gbit/s; an update is {asked.update:,} rows of {asked.sequence:,} tokens, a "
        f"micro-batch {asked.rows} a data rank",
        f"{found.tried:,} mixtures: {len(found.fits):,} fit into {1 - FREE:.0%} of the memory, "
        f"{len(found.too_large):,} do not, {found.refused.total():,} are left out:",
        *(f"  {count:,}  {reason}" for reason, count in found.refused.most_common()),
    ]


# Markdown ------------------------------------------------------------------------------------------------------------

PLACES = ((7e9, 8), (7e9, 64), (7e9, 1024), (70e9, 64), (70e9, 1024))


def plan_tables(top: int = 5) -> str:
    """The tables of docs/scaling.md: the fastest that fit, of each kind of engine and tp and pp only one."""
    parts = []
    for params, gpus in PLACES:
        asked = Asked(params, gpus, 80 * GB)
        found = plan(asked)
        counted = f"{found.tried:,} mixtures, {len(found.fits):,} fit"
        parts.append(f"{found.net.parameters / 1e9:.1f} B on {gpus:,} GPUs of 80 GB ({counted}):")
        parts.append(markdown(different(found.fits)[:top], found.net, asked))
    return "\n\n".join(parts)


def different(fits: list[Planned]) -> list[Planned]:
    """The first of every tp and pp."""
    first: dict[tuple[int, int], Planned] = {}
    for each in fits:
        first.setdefault((each.mix.tp, each.mix.pp), each)
    return list(first.values())


def markdown(planned: list[Planned], net: Network, asked: Asked) -> str:
    rows = {first: others for first, *others in (cells(each, net, asked) for each in planned)}
    return table(COLUMNS[0], list(COLUMNS[1:]), rows)


def bubble_table(k: tuple[int, ...] = (8, 16, 64)) -> str:
    places = [(pp, count) for pp in (2, 4, 8) for count in k]
    rows = {}
    for schedule in SCHEDULES:
        mixes = [(Mixture(pp=pp, schedule=schedule, per_rank=1 if schedule in SINGLE else 2), n) for pp, n in places]
        rows[schedule] = [f"{bubble(mix, count):.1%}" for mix, count in mixes]
    return table("bubble", [f"p = {pp}, k = {count}" for pp, count in places], rows)


# The command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where nothing fits; 2 with one line on stderr for what the user did wrong."""
    parser = argparse.ArgumentParser(
        "memory.py --plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--params", type=float, required=True, metavar="N", help="parameters, about, as in 7e9")
    parser.add_argument("--gpus", type=int, required=True, metavar="R", help=f"in all, up to {MOST_GPUS:,}")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="of a GPU, 10^9 bytes [80]")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node [8]")
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch, a data rank [1]")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of a row [4096]")
    parser.add_argument("--update", type=int, default=1024, help="rows of an update, of all ranks [1024]")
    parser.add_argument("--top", type=int, default=10, help="mixtures that are shown [10]")
    given = parser.parse_args(argv)
    asked = Asked(
        given.params, given.gpus, given.memory * GB, given.node, given.rows, given.seq, given.update
    )  # fmt: skip
    try:
        found = plan(asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found, asked, max(1, given.top), Console(width=max(WIDE, Console().width)))
    return 0 if found.fits else 1
