"""What a split model sends, holds and waits for on paper: worked out by hand, and beside what the code really does."""

import pytest
import torch
from torch import Tensor

import model.attention
import model.gpt
from model import GPT, GPTConfig
from scripts.scaling_paper import Cluster
from scripts.split_paper import (
    SINGLE,
    Held,
    Job,
    Mixture,
    Network,
    bubble,
    bytes_sent,
    cut,
    exits,
    in_flight,
    kept_by_block,
    kept_by_head,
    memory,
    seconds,
    traffic,
)  # fmt: skip
from training.engines import pipeline

SMALL = Network(dim=64, layers=4, heads=4, kv_heads=2)
SEVEN = Network(dim=4096, layers=40, heads=32, kv_heads=8)
ROW = Job(rows=1, sequence=16, micro_batches=3)
TORCH = {"gpipe": "GPipe", "interleaved": "Interleaved1F1B", "zb": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble"}


def config(net: Network) -> GPTConfig:
    return GPTConfig(net.vocab, net.dim, net.layers, net.heads, net.kv_heads, tie_embeddings=net.tied)


@pytest.mark.parametrize("net", [SMALL, SEVEN, SMALL._replace(tied=False)])
def test_a_network_is_what_the_model_is(net: Network) -> None:
    with torch.device("meta"):
        built = GPT(config(net))
    assert (net.ffn, net.parameters) == (built.config.ffn_dim, built.num_parameters())
    block, head = net.operations(128)
    assert net.layers * block + head == built.flops_per_token(128)


def test_stages_are_the_engines() -> None:
    for net, sequence in ((SMALL, 16), (SEVEN, 4096)):
        for stages in (1, 2, 3, 4):
            assert cut(net, sequence, stages) == [len(part) for part in pipeline.cut(config(net), sequence, stages)]
    for schedule, per_rank in (("1f1b", 1), ("interleaved", 3), ("zbv", 2)):
        mix = Mixture(pp=4, schedule=schedule, per_rank=per_rank)
        assert [mix.stages_of(r) for r in range(4)] == [pipeline.stages_of(r, 4, schedule, per_rank) for r in range(4)]


def test_stages_by_hand() -> None:
    # a block has 2 x 64 x (64 + 32) + 3 x 64 x 192 = 49,152 parameters, and 12 x 64 x 16 operations more for attention
    assert SMALL.operations(16) == (6 * 49_152 + 12_288, 6 * 64 * 6400)
    # a head costs 8 such blocks, so that the last of two stages has one block, as few as may be
    assert cut(SMALL, 16, 2) == [3, 1]
    first = Held.by(SMALL, Mixture(pp=2), 16, 0)
    assert first == Held(3, first=True, last=False)
    assert first.shape(SMALL, tp=2) == (3 * (49_152 // 2 + 2 * 64), 409_600 // 2, 3, 0)


# Bytes ---------------------------------------------------------------------------------------------------------------


def whole(found, group: str, kind: str, width: int) -> tuple[int, float]:
    """Messages and bytes of whole tensors, of three micro-batches."""
    fitting = [each for each in found if (each.group, each.kind, each.width) == (group, kind, width)]
    return (
        sum(each.messages * each.times(3) for each in fitting),
        sum(each.width * each.numbers * each.times(3) for each in fitting),
    )


@pytest.mark.parametrize(("again", "gathers", "scatters"), [(False, 17, 17), (True, 25, 21)])
def test_tensor_ranks_by_hand(again: bool, gathers: int, scatters: int) -> None:
    """4 L + 1 of both, and with recomputing 6 L + 1 and 5 L + 1; of 16 x 64 numbers, 3 micro-batches. So many calls and
    bytes `scripts/scaling.py` counted of --tp 2 with this shape."""
    found = traffic(SMALL, Mixture(tp=2, engine="fsdp", checkpointing=again), ROW, 0)
    assert whole(found, "tp", "all_gather", 2) == (3 * gathers, 3 * gathers * 2048)
    assert whole(found, "tp", "reduce_scatter", 2) == (3 * scatters, 3 * scatters * 2048)
    assert whole(found, "tp", "all_gather", 4) == whole(found, "tp", "reduce_scatter", 4) == (3, 3 * 4096)
    # 9 norms of 64 numbers once; maxima, sums and targets of 16 tokens
    assert whole(found, "tp", "all_reduce", 4) == (9 + 3 * 2, 9 * 64 * 4 + 3 * 3 * 16 * 4)
    assert bytes_sent(found, Mixture(tp=2), ROW)["tp"] == (gathers + scatters) * 3 * 1024 + 12_288 + 2304 + 576


def test_stages_send_by_hand() -> None:
    # three activations forward, and a swap of 6,400 x 64 gradients of the tied embedding; of fsdp half of them
    for engine, copies in (("ddp", 409_600), ("fsdp", 204_800)):
        mix = Mixture(pp=2, data=2, engine=engine)
        assert bytes_sent(traffic(SMALL, mix, ROW, 0), mix, ROW)["pp"] == 3 * 4096 + 4 * copies
    # the second of four sends forward and back; tensor ranks send a part each
    mix = Mixture(tp=2, pp=4, engine="fsdp")
    assert bytes_sent(traffic(SMALL, mix, ROW, 1), mix, ROW)["pp"] == 2 * 3 * 4096 / 2
    # all boundaries, each there and back; in a V one lies within a rank
    assert sum(exits(Mixture(pp=4, schedule="interleaved", per_rank=3), rank) for rank in range(4)) == 2 * 11
    assert [exits(Mixture(pp=4, schedule="zbv", per_rank=2), rank) for rank in range(4)] == [2, 4, 4, 2]
    mix = Mixture(pp=4, schedule="zbv", per_rank=2)
    assert all(each.group != "ends" for each in traffic(SMALL._replace(layers=8), mix, ROW, 0))


def test_data_ranks_behind_a_pipeline_by_hand() -> None:
    """fsdp gathers a block k + 1 times, kept once; what is around blocks once: as counted of --pp 2, four ranks."""
    blocks, rest = 3 * (49_152 + 2 * 64), 409_600
    for engine, gathers in (("fsdp", 4), ("fsdp kept", 1)):
        found = traffic(SMALL, Mixture(pp=2, data=2, engine=engine), ROW, 0)
        assert whole(found, "data", "all_gather", 2) == (gathers * 3, gathers * 2 * blocks)
        assert whole(found, "data", "all_gather", 4) == (1, 4 * rest)
        assert whole(found, "data", "reduce_scatter", 4) == (4, 4 * (blocks + rest))
    found = traffic(SMALL, Mixture(pp=2, data=2), ROW, 0)
    assert whole(found, "data", "all_reduce", 4)[1] == 4 * (blocks + rest)
    # without one, the formulas of scaling_paper: two gathers a micro-batch
    found = traffic(SMALL, Mixture(data=2, engine="fsdp"), ROW, 0)
    assert whole(found, "data", "all_gather", 2)[1] == 3 * 2 * 2 * 4 * (49_152 + 2 * 64)


# Bubbles and what is in flight ---------------------------------------------------------------------------------------

UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}  # forward; backward; its two parts


def played(schedule: str, pp: int, k: int, per_rank: int) -> tuple[float, list[int]]:
    """torch's own order of a schedule, played: the share of time that the first rank waits, and for every rank how many
    micro-batches of stages it holds at most, each until all of its backward pass is done."""
    orders = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    ranks = orders.get_schedule_ops(TORCH[schedule], pp, k, per_rank)
    left = [[op for op in ops if op is not None and op.computation_type.value in UNITS] for ops in ranks]
    now, held, most = [0.0] * pp, [0] * pp, [0] * pp
    done: dict[tuple[str, int, int], float] = {}
    while any(left):
        ready = [rank for rank in range(pp) if left[rank] and wants(left[rank][0], pp * per_rank) <= done.keys()]
        assert ready, "no rank can go on"
        for rank in ready:
            op = left[rank].pop(0)
            kind, stage, batch = op.computation_type.value, op.stage_index, op.microbatch_index
            begun = max([now[rank], *(done[each] for each in wants(op, pp * per_rank))])
            now[rank] = begun + UNITS[kind]
            done["I" if kind == "B" else kind, stage, batch] = now[rank]
            held[rank] += {"F": 1, "B": -1, "W": -1}.get(kind, 0)
            most[rank] = max(most[rank], held[rank])
    return 1 - 3 * k * per_rank / max(now), most


def wants(op, stages: int) -> set[tuple[str, int, int]]:
    kind, stage, batch = op.computation_type.value, op.stage_index, op.microbatch_index
    if kind == "F":
        return {("F", stage - 1, batch)} if stage else set()
    if kind == "W":
        return {("I", stage, batch)}
    return {("F", stage, batch)} | ({("I", stage + 1, batch)} if stage + 1 < stages else set())


@pytest.mark.parametrize("schedule", TORCH)
@pytest.mark.parametrize(("pp", "k"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_bubbles_and_activations_are_those_of_torchs_schedules(schedule: str, pp: int, k: int) -> None:
    per_rank = 1 if schedule in SINGLE else 2
    mix = Mixture(pp=pp, schedule=schedule, per_rank=per_rank)
    share, most = played(schedule, pp, k, per_rank)
    assert bubble(mix, k) == pytest.approx(share)
    assert [in_flight(mix, k, rank) for rank in range(pp)] == most


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_a_v_of_few_micro_batches_waits_for_those_that_are_missing(pp: int) -> None:
    mix = Mixture(pp=pp, schedule="zbv", per_rank=2)
    for k in range(1, 2 * pp + 2):
        share, most = played("zbv", pp, k, 2)
        assert bubble(mix, k) == pytest.approx(share)
        assert all(in_flight(mix, k, rank) >= held for rank, held in enumerate(most))


def test_bubbles_by_hand() -> None:
    # three forward passes and three backward ones of 2 while a micro-batch is on its way: 9 of 9 + 24
    assert bubble(Mixture(pp=4), 8) == pytest.approx(9 / (9 + 24))
    assert bubble(Mixture(pp=4, schedule="interleaved", per_rank=3), 8) == pytest.approx(3 / (3 + 24))
    assert bubble(Mixture(pp=1), 8) == 0
    assert [in_flight(Mixture(pp=4), 8, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(Mixture(pp=4), 2, 0) == 2


# Memory --------------------------------------------------------------------------------------------------------------


class Kept(torch.autograd.Function):
    """Keeps what FlashAttention keeps; what it computes does not matter here."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2]))
        return out


def test_a_block_keeps_what_autograd_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the way that a GPU takes, walked on a CPU: its kernel replaced by one that keeps the same tensors."""
    monkeypatch.setattr(model.attention, "varlen", lambda q, k, v, *_: Kept.apply(q, k, v))
    plain = lambda norm, x: norm.weight * model.gpt.normalized(x, norm.eps)[0]  # noqa: E731
    monkeypatch.setattr(model.gpt.RMSNorm, "forward", plain)
    rows, sequence, shape = 3, 20, GPTConfig(dim=128, n_layers=1, n_heads=8, n_kv_heads=2)
    block = model.gpt.Block(shape, 0)
    cos = torch.ones(rows, sequence, 1, 8)
    layout = model.attention.Layout(torch.zeros(rows + 1, dtype=torch.int32), sequence)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(rows, sequence, shape.dim, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        block(x, model.attention.Context(cos, cos.clone(), layout=layout))
    tokens = rows * sequence
    of_tokens = [each for each in saved.values() if tokens in each.shape or each.shape[:2] == (rows, sequence)]
    size = sum(each.untyped_storage().nbytes() for each in of_tokens if each.dtype != torch.int32)
    assert size == tokens * kept_by_block(Network(dim=128, layers=1, heads=8, kv_heads=2))


def test_memory_by_hand() -> None:
    # 512 x 30 + 4 x 128 + 8 x 1408 + 4 x 64 + 4 x 8 + 8 bytes a token, whole; of two tensor ranks
    net = Network(dim=512, layers=8, heads=8, kv_heads=2)
    assert kept_by_block(net) == 27_432
    assert kept_by_block(net, tp=2) == (20 * 512 + 4 * 128 + 8 * 1408 + 4 * 8 + 8) / 2 + 4 * 512 + 4 * 64
    job = Job(rows=2, sequence=512, micro_batches=8)
    # the first of two stages holds two micro-batches of its four blocks; each has 16-bit copies of its weights
    assert cut(net, 512, 2) == [4, 4]
    held = memory(net, Mixture(pp=2), job, 0)
    shape = Held(4, first=True, last=False).shape(net, 1)
    # and three outputs and two gradients of 1,024 x 512 float32 numbers
    assert held == (16 * shape.total + 2 * shape.blocks * 2, 2 * 4 * 1024 * 27_432, 0, 5 * 4 * 1024 * 512)
    # what is sent stays until the update ends: of 8 micro-batches two outputs and a gradient each
    held = memory(net, Mixture(pp=2, schedule="interleaved", per_rank=2), job, 0)
    assert held.messages == (8 * 3 + 2) * 4 * 1024 * 512
    # recomputing: what went into each, and one whole block
    held = memory(net, Mixture(pp=2, checkpointing=True), job, 0)
    assert held.activations == 2 * 4 * 1024 * 4 * 512 + 1024 * 27_432
    assert held.state == 16 * shape.total + 2 * shape.blocks / 4
    # the head, of all 1,024 tokens in one chunk: 14 d bytes a token, 6 of its parameters, 8 of the logits
    last = memory(net, Mixture(pp=2), job, 1)
    assert last.activations == 1 * 4 * 1024 * 27_432
    assert last.head == kept_by_head(net, Mixture(pp=2), job) == 1024 * 14 * 512 + 6 * 6400 * 512 + 8 * 1024 * 6400
    # fsdp's are divided, and gathered ones stay
    held = memory(net, Mixture(pp=2, data=4, engine="fsdp"), job, 0)
    assert held.state == 16 * shape.total / 4 + 2 * shape.blocks + 4 * shape.rest + 4 * shape.total


# Time ----------------------------------------------------------------------------------------------------------------


def test_time_by_hand() -> None:
    """1e9 operations and 1e6 bytes a second everywhere, no latency."""
    plain = Cluster("plain", across=1e6, flops=1e9, inside=1e6, hop_inside=0, hop_across=0)
    block, head = SMALL.operations(16)
    whole = (4 * block + head) * 16 / 1e9
    job = Job(rows=1, sequence=16, micro_batches=2)
    assert seconds(SMALL, Mixture(), job, plain) == pytest.approx(2 * whole)
    assert seconds(SMALL, Mixture(checkpointing=True), job, plain) == pytest.approx(2 * whole * 4 / 3)
    # two tensor ranks halve it, and wait for half of every message: 17 + 17 in 16 bits, 1 + 1 in 32, the losses' 3 x 16
    # numbers, in either micro-batch; the norms' gradients once
    waits = (34 * 2048 + 2 * 4096) / 2 / 1e6 + 3 * 64 / 1e6
    tensor = Mixture(tp=2, engine="fsdp")
    assert seconds(SMALL, tensor, job, plain) == pytest.approx(whole + 2 * waits + 9 * 256 / 1e6)
    # a pipeline goes at the pace of its slowest rank, here the last, of one block and the head: 4,096 bytes back behind
    # it; then one activation and one gradient alone, and the embedding's gradients
    slow = max((block + head) * 16 / 1e9, 4096 / 1e6)
    piped = seconds(SMALL, Mixture(pp=2), job, plain)
    assert piped == pytest.approx(2 * slow / (1 - 1 / 3) + 2 * 4096 / 1e6 + 4 * 409_600 / 1e6)
