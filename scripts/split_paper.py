"""What a split model sends, holds and waits for, by formula: tensor and pipeline parallel beside the data ranks.

    net = Network(dim=4096, layers=40, heads=32, kv_heads=8)            7.1 B parameters
    mix = Mixture(tp=8, pp=2, data=4, engine="fsdp kept")               64 ranks, 1f1b
    job = Job(rows=1, sequence=4096, micro_batches=256)
    traffic(net, mix, job, rank=0)    [Traffic("all_gather", 2, numbers, "forward", group="tp", ...), ...]
    bubble(mix, 256)                  0.0039, of a rank's time
    memory(net, mix, job, rank=0)     Memory(state=..., activations=..., head=..., messages=...), bytes
    seconds(net, mix, job, cluster)   of an update

What data ranks send, and the cluster, are scripts/scaling_paper.py's. `rank` is one among the pipeline's; all tensor
and data ranks of a stage are alike. t = rows x sequence are the tokens of a micro-batch, a = t x dim the numbers of one
activation, w the bytes of the type that blocks compute in (bfloat16: 2), k the micro-batches of an update, p = pp, V
the stages a rank holds, S = V p all of them.
"""

import math
from functools import cache
from typing import NamedTuple

from scripts.scaling_paper import Cluster, Shape, Traffic, along, circle, formula, holds, sent
from training import division
from training.division import SINGLE, ZERO_BUBBLE

SCHEDULES = (*SINGLE, "interleaved", *ZERO_BUBBLE)
WIDTH = 2  # w
LOSS_BYTES, LOSS_TOKENS = 1 << 28, 128  # model/gpt.py's, of a GPU: logits that are held at a time


class Network(NamedTuple):
    """A shape of model.GPTConfig."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 6400
    tied: bool = True

    @property
    def ffn(self) -> int:
        """model.config.default_ffn_dim, without the import of torch."""
        return 64 * math.ceil(8 * self.dim // 3 / 64)

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.dim // self.heads

    @property
    def block(self) -> int:
        """Parameters of a block's matrices."""
        return 2 * self.dim * (self.dim + self.kv_dim) + 3 * self.dim * self.ffn

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.dim
        return self.layers * self.block + norms + self.vocab * self.dim * (1 if self.tied else 2)

    def operations(self, sequence: int) -> tuple[float, float]:
        """Of a token, forward and backward: of a block, and of the head. 6 N + 12 H Q T, as model.config counts."""
        return 6.0 * self.block + 12.0 * self.dim * sequence, 6.0 * self.dim * self.vocab


class Mixture(NamedTuple):
    """How ranks are divided. engine: "ddp", "fsdp", "hsdp", the last two also with " kept" (--fsdp_reshard no)."""

    tp: int = 1
    pp: int = 1
    data: int = 1
    engine: str = "ddp"
    schedule: str = "1f1b"
    per_rank: int = 1  # V
    checkpointing: bool = False

    @property
    def stages(self) -> int:
        return self.pp * self.per_rank

    def stages_of(self, rank: int) -> list[int]:
        return division.stages_of(rank, self.pp, self.schedule, self.per_rank)

    def parts(self, node: int) -> int:
        """Ranks that a stage's state is divided among, tensor ranks aside. node: GPUs of one."""
        if self.engine == "ddp":
            return 1
        return min(self.data, max(1, node // self.tp)) if self.engine.startswith("hsdp") else self.data


class Job(NamedTuple):
    rows: int  # of a micro-batch, a data rank
    sequence: int
    micro_batches: int  # k

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence


@cache
def cut(net: Network, sequence: int, stages: int) -> list[int]:
    """Blocks of every stage.

    Two stages of 8 blocks with a head as dear as 2 blocks: [5, 3].
    """
    return [len(blocks) for blocks in division.cut(net.layers, *net.operations(sequence), stages)]


class Held(NamedTuple):
    """What a rank of the pipeline has of the network."""

    blocks: int
    first: bool  # the embedding
    last: bool  # last norm and head

    @classmethod
    def by(cls, net: Network, mix: Mixture, sequence: int, rank: int) -> "Held":
        mine, counts = mix.stages_of(rank), cut(net, sequence, mix.stages)
        return cls(sum(counts[stage] for stage in mine), 0 in mine, mix.stages - 1 in mine)

    def shape(self, net: Network, tp: int) -> Shape:
        """Parameters: matrices are cut over tensor ranks, norms are whole. A tied head is a copy where the embedding is
        on another rank."""
        tables = (self.first + self.last) if not net.tied else (self.first or self.last)
        rest = tables * net.vocab * net.dim // tp + self.last * net.dim
        return Shape(self.blocks * (net.block // tp + 2 * net.dim), rest, self.blocks, small=0)


# Bytes ---------------------------------------------------------------------------------------------------------------


def traffic(net: Network, mix: Mixture, job: Job, rank: int, node: int = 8) -> list[Traffic]:
    """What one rank takes part in, in an update. Groups: "tp", "stage", "ends", "data"; of hsdp "node" and "nodes".

    Left out are counts, losses and norms: a few numbers an update.
    """
    held = Held.by(net, mix, job.sequence, rank)
    return [*tensor(net, mix, job, held), *between_stages(net, mix, job, rank, node), *data(net, mix, job, held, node)]


def tensor(net: Network, mix: Mixture, job: Job, held: Held) -> list[Traffic]:
    """Among tensor ranks: all-gathers and reduce-scatters of a numbers, in sequence parallel (Korthikanti et al. 2022,
    arXiv:2205.05198). A micro-batch, of a model with L blocks:

        forward      embedding 1 scatter (float32); a block 2 gathers, 2 scatters; behind the last norm 1 gather
        backward     the duals: 1 scatter; a block 2 scatters, 2 gathers; 1 gather (float32)
        together     4 L + 1 gathers and 4 L + 1 scatters in w bytes, and one of each in float32

    Recomputing (--grad_checkpointing) repeats both gathers of a block and one scatter: the block's last one has nothing
    behind it that the backward pass wants. The loss has two all-reduces of t and 2 t float32 numbers a micro-batch
    (maximum; sum of exponentials and target's logit). Gradients of norms, which are whole on every rank: an all-reduce
    a norm, once an update, in float32.
    """
    if mix.tp == 1:
        return []
    a, again, n = job.tokens * net.dim, mix.checkpointing, held.blocks
    norms = 2 * n + held.last

    def each(kind: str, width: int, count: int, phase: str) -> Traffic:
        return Traffic(kind, width, count * a, phase, True, count, "tp")

    found = [
        each("all_gather", WIDTH, 2 * n + held.last, "forward"),
        each("reduce_scatter", WIDTH, 2 * n, "forward"),
        each("reduce_scatter", WIDTH, (2 + again) * n + held.last, "backward"),
        each("all_gather", WIDTH, (2 + 2 * again) * n, "backward"),
        Traffic("all_reduce", 4, norms * net.dim, "alone", messages=norms, group="tp"),
    ]
    if held.first:
        found += [each("reduce_scatter", 4, 1, "forward"), each("all_gather", 4, 1, "backward")]
    if held.last:
        chunks = math.ceil(job.tokens / chunk_of(net, mix.tp))
        found += [Traffic("all_reduce", 4, 3 * job.tokens, "forward", True, 2 * chunks, "tp")]
    return found


def between_stages(net: Network, mix: Mixture, job: Job, rank: int, node: int) -> list[Traffic]:
    """What a rank sends to other stages: at each boundary an activation forward and its gradient back, k times, a / tp
    float32 numbers each. In all S - 1 boundaries; in a V (zbv) the middle two stages are on one rank, one fewer.

    The two copies of a tied embedding swap their gradients once an update, vocabulary x dim / tp numbers, of fsdp this
    rank's part; in a V both are on the first rank.
    """
    if mix.pp == 1:
        return []
    sends = exits(mix, rank)
    found = [Traffic("send", 4, sends * job.tokens * net.dim / mix.tp, "backward", True, sends, "stage")]
    ends = mix.schedule != "zbv" and rank in (0, mix.pp - 1)
    if net.tied and ends:
        size = net.vocab * net.dim / mix.tp / mix.parts(node)
        found.append(Traffic("send", 4, size, "alone", group="ends"))
    return found


def exits(mix: Mixture, rank: int) -> int:
    """Tensors that a rank sends to others a micro-batch."""
    mine = mix.stages_of(rank)
    forward = sum(stage + 1 < mix.stages and stage + 1 not in mine for stage in mine)
    return forward + sum(stage > 0 and stage - 1 not in mine for stage in mine)


def data(net: Network, mix: Mixture, job: Job, held: Held, node: int) -> list[Traffic]:
    """Among data ranks: scaling_paper's formulas for what the rank holds. A pipeline differs from them in this:

    ddp sums after the schedule, with nothing to hide behind. fsdp's parameters stay gathered after a backward pass,
    which torch.distributed.pipelining sees to; so a block is gathered k + 1 times an update in place of 2 k (once with
    --fsdp_reshard no), whatever the schedule, and what is around blocks once.
    """
    if mix.data == 1:
        return []
    shape, parts = held.shape(net, mix.tp), mix.parts(node)
    group = {"ddp": "data", "fsdp": "data", "hsdp": "node"}[mix.engine.split()[0]]
    if mix.pp == 1:
        found = formula(mix.engine, shape, WIDTH, parts)
    else:
        kept = mix.engine if mix.engine == "ddp" or mix.engine.endswith(" kept") else f"{mix.engine} kept"
        found = [each._replace(phase="alone") for each in formula(kept, shape, WIDTH, parts)]
        if kept != mix.engine:
            found.append(Traffic("all_gather", WIDTH, shape.blocks, "backward", True, shape.n_blocks))
    return [each._replace(group="nodes" if each.group == "nodes" else group) for each in found]


def bytes_sent(found: list[Traffic], mix: Mixture, job: Job, node: int = 8) -> dict[str, float]:
    """By the rank, in an update: {"tp": of tensor ranks, "pp": to other stages, "data": among data ranks}."""
    total = {"tp": 0.0, "pp": 0.0, "data": 0.0}
    named = {"tp": "tp", "stage": "pp", "ends": "pp"}
    for each in found:
        size = each.width * each.numbers * each.times(job.micro_batches)
        ranks = group_size(each.group, mix, node)
        total[named.get(each.group, "data")] += size if each.kind == "send" else sent(each.kind, size, ranks)
    return total


def group_size(group: str, mix: Mixture, node: int) -> int:
    parts = mix.parts(node)
    return {"tp": mix.tp, "data": mix.data, "node": parts, "nodes": mix.data // parts}.get(group, 2)


# Bubbles -------------------------------------------------------------------------------------------------------------


def bubble(mix: Mixture, k: int) -> float:
    """The share of a rank's time in which it waits for others, stages being equal. F is the time of all of a rank's
    stages for a micro-batch forward, B of the gradients of their inputs, W of their weights. The share is idle / (idle
    + k (F + B + W)), here with F = B = W, and idle is

        gpipe          (p - 1) (F + B + W)        Huang et al. 2019, arXiv:1811.06965
        1f1b           (p - 1) (F + B + W)        Narayanan et al. 2021, arXiv:2104.04473, section 2.2
        interleaved    (p - 1) (F + B + W) / V    the same
        zb             (p - 1) (F + B - W) / V    Qi et al. 2023, arXiv:2401.10241: ZB-H1, where V = 1
        zbv            (p - 1) (F + B - W) / 2    and (2 p - 1 - k) F where that is more: with few micro-batches it
                                                  keeps the order of 2 p - 1, and waits where one is missing

    zbv's is 0 in its paper (Qi et al. 2024, arXiv:2405.15362), where the first ranks begin an update before the last
    ones end theirs. Here all meet at the gradient's norm, so each rank's wait for its first micro-batch stays.
    """
    work, idle = 3, (mix.pp - 1) * (1 if mix.schedule in ZERO_BUBBLE else 3)
    if mix.schedule == "zbv":
        idle = max(idle, 2 * (2 * mix.pp - 1 - k))
    return idle / (idle + k * work * mix.per_rank)


def in_flight(mix: Mixture, k: int, rank: int) -> int:
    """Micro-batches times stages whose activations a rank holds at most; each stage has 1 / V of its blocks.

        gpipe          k
        1f1b           p - rank
        interleaved    2 (p - 1 - rank) + (V - 1) p + 1
        zb, zbv        V p on every rank: activations stay until W, which waits so as to fill the end

    and of none more than V k.
    """
    p, per_rank = mix.pp, mix.per_rank
    most = {
        "gpipe": k,
        "1f1b": p - rank,
        "interleaved": 2 * (p - 1 - rank) + (per_rank - 1) * p + 1,
        "zb": per_rank * p,
        "zbv": per_rank * p,
    }
    return min(most[mix.schedule], per_rank * k) if p > 1 else 1


# Memory --------------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of a GPU."""

    state: float  # parameters, gradients, AdamW's moments, 16-bit and gathered copies
    activations: float  # that blocks keep for the backward pass
    head: float  # last norm, logits of a chunk, the head's gradient
    messages: float  # to other stages

    @property
    def total(self) -> float:
        return sum(self)


def kept_by_block(net: Network, tp: int = 1) -> float:
    """Bytes a token that a block keeps for its backward pass, of bfloat16 under autocast and FlashAttention; d = dim, c
    = numbers of all keys, f = ffn, q = head width, H = heads. Tensor ranks divide what stands in brackets.

        [16 d]        two norms: each the residual stream and what it made of it, in float32
        10 d          inputs of q, k, v, gate and up: autocast makes a copy for each, in 16 bits
        4 d under tp  in place of that: whole rows are gathered in 16 bits, once for q, k, v, once for gate, up
        [4 d + 4 c]   turned queries and keys, values, and what attention gives
        [4 H]         its log-sum-exp, float32
        4 q           cosines and sines in 16 bits, for queries and for keys
        [8 f]         gate, silu(gate), up and their product
        [8]           1 / rms, twice, float32

    Together 30 d + 4 c + 8 f + 4 q + 4 H + 8 without tp: 27,432 for d 512, c 128, f 1,408, H 8, and so many are what
    autograd saves. A compiled block computes pointwise things again and keeps 14 d + 4 c + 6 f + 2 q + 4 H + 8 of them
    (16,296); planned is with the larger. Korthikanti et al. 2022 (arXiv:2205.05198) have 34 h + 5 a s for GPT-3's block
    (h = dim, a heads, s sequence), all in 16 bits and with the s x s scores, which FlashAttention does not keep.
    """
    width = net.dim // net.heads
    cut_up = 20 * net.dim + 4 * net.kv_dim + 4 * net.heads + 8 * net.ffn + 8
    return cut_up / tp + (10 if tp == 1 else 4) * net.dim + 4 * width


def chunk_of(net: Network, tp: int) -> int:
    """Tokens whose logits are made together."""
    return max(LOSS_TOKENS, LOSS_BYTES // (4 * math.ceil(net.vocab / tp)))


def kept_by_head(net: Network, mix: Mixture, job: Job) -> float:
    """Bytes at the last stage: the last norm's two float32 tensors, 16-bit hidden states, their copy at the places that
    learn and its gradient; the head in 16 bits and its gradient in float32; of a chunk logits and their gradient in 16
    bits, and the softmax in float32. gpipe keeps what the backward pass wants of all k."""
    table = net.vocab * net.dim / mix.tp
    saved = job.tokens * (8 / mix.tp + 2) * net.dim + 4 * table
    made = 4 * job.tokens * net.dim + 2 * table
    chunk = min(job.tokens, chunk_of(net, mix.tp)) * math.ceil(net.vocab / mix.tp)
    return saved * (job.micro_batches if mix.pp > 1 and mix.schedule == "gpipe" else 1) + made + 8 * chunk


def messages(net: Network, mix: Mixture, job: Job, rank: int) -> float:
    """Bytes that a rank of the pipeline holds of what it sends to others, 4 a / tp each, and of what comes in.

        1f1b       an output until its gradient is there, the last one sent, two gradients on their way in and two out
        others     all that an update sends, k times `exits`: PyTorch waits for them at its end, and they are kept until
                   they were waited for; and two gradients on their way in

    Hidden states that come in are what a stage's first norm keeps, and counted there.
    """
    one = 4 * job.tokens * net.dim / mix.tp
    first, last = rank == 0, rank == mix.pp - 1
    if mix.pp == 1:
        return 0.0
    if mix.schedule == "1f1b":
        return one * (2 * (not first) + (not last) * (3 + in_flight(mix, job.micro_batches, rank)))
    comes_in = not last or mix.per_rank > 1
    return one * (job.micro_batches * exits(mix, rank) + 2 * comes_in)


def memory(net: Network, mix: Mixture, job: Job, rank: int, node: int = 8) -> Memory:
    """Of a rank of the pipeline, at most. With checkpointing a block keeps the residual stream it was given, 4 d / tp
    bytes a token, and one block at a time all of `kept_by_block`. Left out: what a backward pass makes on the way,
    buffers of NCCL, fragmentation."""
    held = Held.by(net, mix, job.sequence, rank)
    blocks = in_flight(mix, job.micro_batches, rank) * held.blocks / mix.per_rank
    block = job.tokens * kept_by_block(net, mix.tp)
    kept = blocks * job.tokens * 4 * net.dim / mix.tp + block if mix.checkpointing else blocks * block
    state = state_of(mix, held.shape(net, mix.tp), job, node, blocks)
    head = kept_by_head(net, mix, job) if held.last else 0.0
    return Memory(state, kept, head, messages(net, mix, job, rank))


def state_of(mix: Mixture, shape: Shape, job: Job, node: int, in_flight: float) -> float:
    """Bytes that do not depend on tokens: `scaling_paper.holds`, of a pipeline with two differences. in_flight: blocks
    times micro-batches.

    fsdp's parameters stay gathered (see `data`). ddp has 16-bit copies of weights, made by autocast for every
    micro-batch anew, which its backward pass wants: as many as blocks are in flight; with checkpointing one block's.
    """
    if mix.pp == 1:
        return holds(mix.engine, shape, mix.parts(node), job.micro_batches)
    if mix.engine != "ddp":
        return holds(f"{mix.engine.split()[0]} kept", shape, mix.parts(node), job.micro_batches)
    copies = 1 if mix.checkpointing else in_flight
    return 16 * shape.total + 2 * shape.blocks / shape.n_blocks * copies


# Time ----------------------------------------------------------------------------------------------------------------


def seconds(net: Network, mix: Mixture, job: Job, cluster: Cluster) -> float:
    """Of an update; the slowest rank sets the pace.

    A micro-batch takes its operations (a third forward; recomputing is a third more) and what tensor ranks tell each
    other, which nothing hides. Behind either pass move fsdp's gathers, behind both a pipeline's sends: what is longer
    counts. All micro-batches / (1 - bubble); then the way of the first activation through all stages and of the
    last gradient back; and what comes once an update: without a pipeline the last backward pass hides its reductions,
    as in scaling_paper, and behind a schedule nothing does.
    """
    return max(seconds_of(net, mix, job, cluster, rank) for rank in telling(mix))


def telling(mix: Mixture) -> list[int]:
    """Ranks of the pipeline among which the largest of anything is: the ends and their neighbours."""
    return sorted({0, min(1, mix.pp - 1), max(0, mix.pp - 2), mix.pp - 1})


def seconds_of(net: Network, mix: Mixture, job: Job, cluster: Cluster, rank: int) -> float:
    k, held = job.micro_batches, Held.by(net, mix, job.sequence, rank)
    block, head = net.operations(job.sequence)
    third = (held.blocks * block + held.last * head) * job.tokens / mix.tp / cluster.flops / 3
    moving = {(phase, every, where): 0.0 for phase in PHASES for every in (True, False) for where in ("tp", "else")}
    sends = 0.0
    for each in traffic(net, mix, job, rank, cluster.node):
        took = on_the_way(each, mix, cluster)
        if each.group == "stage":
            sends = took
        else:
            moving[each.phase, each.every, "tp" if each.group == "tp" else "else"] += took
    alone = moving["alone", False, "tp"] + moving["alone", False, "else"]
    once, last = 0.0, 0.0
    for phase, busy in (("forward", third), ("backward", (3 if mix.checkpointing else 2) * third)):
        busy += moving[phase, True, "tp"]
        behind = moving[phase, True, "else"]
        once += max(busy, behind)
        last += max(busy, behind + moving[phase, False, "else"])
    steady = (k - 1) * max(once, sends) + max(last, sends)
    return steady / (1 - bubble(mix, k)) + fill(job, net, mix, cluster) + alone


PHASES = ("forward", "backward", "alone")


def fill(job: Job, net: Network, mix: Mixture, cluster: Cluster) -> float:
    """One activation through all stages, and one gradient back."""
    one = Traffic("send", 4, job.tokens * net.dim / mix.tp, "alone", group="stage")
    return 2 * (mix.stages - 1) * on_the_way(one, mix, cluster) if mix.pp > 1 else 0.0


def on_the_way(each: Traffic, mix: Mixture, cluster: Cluster) -> float:
    """Seconds of a kind of message; a node's tensor ranks are neighbours, and so are data ranks beside them."""
    if each.kind == "send":
        across = mix.tp * mix.data * mix.pp > cluster.node  # then some boundary lies between nodes
        bandwidth, hop = (cluster.across, cluster.hop_across) if across else (cluster.inside, cluster.hop_inside)
        return each.messages * hop + each.width * each.numbers / bandwidth
    size = group_size(each.group, mix, cluster.node)
    a_node = {"tp": cluster.node, "node": size, "nodes": 1}.get(each.group, max(1, cluster.node // mix.tp))
    return along(each, *circle(size, a_node, cluster))
