"""Engines of several ranks, met alone by one process: what compiled blocks share, what is gathered and in which
buckets gradients travel."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import model.attention
from dataset.batch import Batch
from model import GPT, GPTConfig, generate
from model.adapters import LoRA
from tests.conftest import TINY, spread_weights
from training import NextToken, PretrainConfig, distributed
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.engines.ddp import DDPEngine, bucket_size
from training.engines.fsdp import FSDPEngine

CPU = torch.device("cpu")
MACHINE = Machine(World(), CPU, torch.float32)


@pytest.fixture(autouse=True)
def met_alone() -> Iterator[None]:
    distributed.start(World(), CPU)
    yield
    distributed.stop()
    torch.compiler.reset()


def make(adapter: LoRA | None = None, **changes: object) -> GPT:
    made = GPT(GPTConfig(**(TINY | {"n_layers": 4} | changes)), adapter)  # type: ignore[arg-type]
    spread_weights(made)
    return made


def packed(*lengths: int, seed: int = 0) -> Batch:
    """Two rows of 12 places, each of documents of these lengths."""
    assert sum(lengths) == 12
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, 12)
    ids = torch.randint(4, 90, (2, 13), generator=torch.Generator().manual_seed(seed))
    batch = Batch.of(ids[:, :-1], ids[:, 1:], positions, [0, 1], 24)
    batch.cu_seqlens = F.pad(batch.cu_seqlens, (0, 9 - len(batch.cu_seqlens)), value=24)  # as loaders make them
    return batch


def varlen(q, k, v, cu_seqlens, keys_too, longest, longest_key):
    """FlashAttention's result, in operators that a graph may hold."""
    place = torch.arange(len(q))
    sequence = (place[:, None] >= cu_seqlens).sum(-1)
    mask = (sequence[:, None] == sequence) & (place[:, None] >= place)
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(0, 1)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.attention, "has_varlen", lambda *asked: True)
    monkeypatch.setattr(model.attention, "VARLEN_GQA", True)
    monkeypatch.setattr(model.attention, "varlen", varlen)


# Compiled blocks ------------------------------------------------------------------------------------------------


class Graphs:
    """A backend of torch.compile that runs a graph as it is, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        self.made += 1
        return graph.forward


@pytest.mark.parametrize(
    ("kind", "flags", "adapter"),
    [
        (SingleEngine, {}, None),
        (SingleEngine, {"grad_checkpointing": True}, None),
        (DDPEngine, {}, None),
        (FSDPEngine, {}, None),
        (SingleEngine, {}, LoRA(rank=2, dora=True, tokens=(1, 2))),
        (FSDPEngine, {"grad_checkpointing": True}, LoRA(rank=2, targets=("q_proj", "o_proj"), dropout=0.1)),
    ],
    ids=["single", "checkpointed", "ddp", "fsdp", "dora", "fsdp, lora"],
)
def test_all_blocks_share_one_graph_without_a_break_whatever_the_packing(
    as_on_cuda: None, kind: type, flags: dict, adapter: LoRA | None
) -> None:
    graphs = Graphs()

    class Counting(kind):
        compiler = graphs

    def update(*lengths: int) -> None:
        engine.forward_backward([packed(*lengths)], NextToken())
        engine.step(1e-3)

    engine = Counting(make(adapter), PretrainConfig(compile=True, **flags), MACHINE)
    torch._dynamo.utils.counters.clear()
    update(12)
    # for all blocks, and for the loss; of a frozen embedding nothing is asked back, so the first block has its own
    made = 3 if adapter is not None and not adapter.tokens else 2
    assert graphs.made == made
    update(3, 4, 5)
    with engine.generator() as network:
        generate(network, [[5, 6, 7], [8]], max_new_tokens=5, temperature=0)
    update(6, 6)
    assert graphs.made == made
    assert not torch._dynamo.utils.counters["graph_break"]
    evaluated = [engine.evaluate([packed(5, 7)], NextToken()).sums for _ in range(2)]
    update(2, 10)
    assert (
        graphs.made == made + 1 and evaluated[0] == evaluated[1]
    )  # the blocks' second one, without dropout and gradients


def test_compiled_blocks_learn_what_others_do() -> None:
    class Counting(SingleEngine):
        compiler = Graphs()

    sums = []
    for kind, compiled in ((SingleEngine, False), (Counting, True)):
        engine = kind(make(), PretrainConfig(compile=compiled), MACHINE)
        for lengths in ((12,), (3, 4, 5)):
            sums.append(engine.forward_backward([packed(*lengths)], NextToken()).read().sums["loss"])
            engine.step(1e-3)
    assert sums[2:] == pytest.approx(sums[:2], rel=1e-6)


@pytest.mark.parametrize(("asked", "compiled"), [(None, False), (False, False), (True, True)])
def test_a_cpu_compiles_where_asked_alone(asked: bool | None, compiled: bool) -> None:
    assert distributed.pick_compile(asked, CPU) is compiled


def test_float32_goes_through_tensor_cores_on_a_gpu_alone() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for device, dtype, expected in (
            ("cpu", "float32", before),
            ("cuda", "bfloat16", before),
            ("cuda", "float32", "high"),
        ):
            distributed.use_tensor_cores(torch.device(device), getattr(torch, dtype))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


# What travels ---------------------------------------------------------------------------------------------------


class Gathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function)
        if "c10d" in name and "gather" in name:
            self.calls["gathers"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reshard", "gathers"),
    # four blocks, and what stands around them, which stays from forward to backward
    [(None, 3 * (2 * 4 + 1)), (True, 3 * (2 * 4 + 1)), (False, 4 + 1)],
)
def test_parameters_that_stay_are_gathered_once_an_update(reshard: bool | None, gathers: int) -> None:
    """Counted on the first of two ranks, of which there is no other: what would be sent goes nowhere."""
    distributed.stop()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    machine = Machine(World(0, 2, 0, 2), CPU, torch.float32)
    engine = FSDPEngine(make(), PretrainConfig(engine="fsdp", fsdp_reshard=reshard), machine)
    for _ in range(2):
        with Gathers() as counted:
            engine.forward_backward([packed(12, seed=i) for i in range(3)], NextToken(), weight=144.0)
        engine.step(1e-3)
        assert counted.calls["gathers"] == gathers


@pytest.mark.parametrize(("parameters", "expected"), [(1_000, 1.0), (39_321_600, 12.5), (78_643_200, None)])
def test_gradients_travel_in_several_buckets_of_a_size_worth_a_message(parameters: int, expected: float | None) -> None:
    with torch.device("meta"):
        assert bucket_size(torch.nn.Linear(parameters, 1, bias=False)) == expected
