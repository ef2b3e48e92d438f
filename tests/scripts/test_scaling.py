"""What an update sends is what the formulas say; and what these say of a cluster is their arithmetic."""

import json
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from scripts.bubble import UNITS, Action, idle, shares
from scripts.scaling_paper import Cluster, Shape, bytes_sent, holds, seconds, tables, tokens_for, transfer, used
from scripts.scaling_paper import Traffic as T
from tests.helpers import ROOT, train_here, train_many

N, BLOCKS, LAYERS, SMALL = 504_128, 94_464, 2, 94_528  # parameters of the shape below; all tensors but the embedding
REST, K = N - BLOCKS, 3
A = 16 * 64  # numbers of a micro-batch's hidden states
HEADS = ["--n_heads", 8, "--n_kv_heads", 2]
SHAPE = ["--dim", 64, "--n_layers", LAYERS, *HEADS, "--device", "cpu", "--max_seq_len", 16, "--batch_size", 1]
RUN = [*SHAPE, "--accumulation_steps", K, "--max_steps", 1]
ZERO = ["--engine", "deepspeed", "--zero_stage"]
HALF = ["--dtype", "bfloat16"]
BF16, FP32 = "bfloat16 over 2", "float32 over 2"
ENGINES: dict[str, tuple[list[Any], dict[str, int]]] = {
    # gradients travel in float32, once an update, however many micro-batches
    "ddp": (["--engine", "ddp", *HALF], {f"all_reduce {FP32}": 4 * N}),
    # blocks are gathered for forward and backward of each micro-batch, what is around them once for both
    "fsdp": (
        ["--engine", "fsdp", *HALF],
        {f"all_gather {BF16}": K * 2 * 2 * BLOCKS, f"all_gather {FP32}": K * 4 * REST, f"reduce_scatter {FP32}": 4 * N},
    ),
    "fsdp, kept": (
        ["--engine", "fsdp", "--fsdp_reshard", "no", *HALF],
        {f"all_gather {BF16}": 2 * BLOCKS, f"all_gather {FP32}": 4 * REST, f"reduce_scatter {FP32}": 4 * N},
    ),
    # DeepSpeed reduces whole buckets on every rank, where the paper has a reduce-scatter
    "zero2": ([*ZERO, 2, *HALF], {f"all_reduce {BF16}": K * 2 * N, f"all_gather {BF16}": 2 * N}),
    "zero3": (
        [*ZERO, 3, *HALF],
        {f"all_gather {BF16}": 2 * (K * (N - SMALL) + SMALL), f"reduce_scatter {BF16}": K * 2 * N},
    ),
    # gathers of two bytes a number: two a block forward, two backward, one behind the last norm; scatters as many, and
    # one of each at the embedding in four bytes. Of norms the gradients, of the loss three numbers a token
    "tp": (
        ["--engine", "fsdp", "--tp", 2, *HALF],
        {f"{kind} {BF16}": K * (4 * LAYERS + 1) * 2 * A for kind in ("all_gather", "reduce_scatter")}
        | {f"{kind} {FP32}": K * 4 * A for kind in ("all_gather", "reduce_scatter")}
        | {f"all_reduce {FP32}": 4 * (2 * LAYERS + 1) * 64 + K * 4 * 3 * 16},
    ),
    # an activation to the last stage, and its gradient back; of the table's two copies the gradients, to each other
    "pp": (["--engine", "ddp", "--pp", 2, *HALF], {f"send {FP32}": K * 4 * A + 4 * 6400 * 64}),
}  # fmt: skip
NUMBERS = 200  # bytes of losses and norms, which no formula has


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    said = train_many(
        tmp_path_factory.mktemp("scaling"), [("scaling", [*RUN, *flags]) for flags, _ in ENGINES.values()]
    )
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return dict(zip(ENGINES, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_send_what_the_formula_says(results: dict[str, dict[str, Any]], engine: str) -> None:
    result, expected = results[engine], ENGINES[engine][1]
    assert (result["ranks"], result["micro_batches"], result["parameters"]) == (2, K, N)
    assert {key: size for key, size in result["formula"].items() if size} == expected
    others = {key: size for key, size in result["bytes"].items() if key not in expected}
    assert sum(others.values()) <= NUMBERS
    for key, size in expected.items():
        assert size <= result["bytes"][key] <= size + NUMBERS, key
    # of two ranks each sends half of what is gathered or scattered, and all of what is reduced on both
    factor = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5, "send": 1.0}
    sent = sum(factor[key.split()[0]] * size for key, size in expected.items())
    assert result["sent_by_formula"] == round(sent) and sent <= result["sent"] <= sent + NUMBERS


@pytest.mark.slow
def test_stages_send_the_same_and_wait_as_long_as_their_schedule_says(results: dict[str, dict[str, Any]]) -> None:
    first, last = results["pp"]["stages"]
    assert first["bytes"][f"send {FP32}"] == last["bytes"][f"send {FP32}"] == K * 4 * A + 4 * 6400 * 64
    bubble = results["pp"]["bubble"]
    assert bubble["formula"] == pytest.approx(1 / (K + 1)) and bubble["order"] == pytest.approx(bubble["formula"])
    assert 0 < bubble["costs"] < 1 and 0 < bubble["waited"] < 1
    assert results["tp"]["bubble"] == {}


@pytest.mark.slow
def test_what_linux_counts_is_no_less(results: dict[str, dict[str, Any]]) -> None:
    """Other programs may have sent as well, so that only the lower bound holds everywhere."""
    if not any(result["wire"] for result in results.values()):
        pytest.skip("no /proc/net/dev")
    assert all(result["wire"] >= result["sent"] for result in results.values())


def test_one_process_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    train_here("scaling", *SHAPE, "--max_steps", 1)
    result = json.loads(capsys.readouterr().out)
    assert (result["ranks"], result["sent"], result["bytes"]) == (1, 0, {}) and result["seconds"]["least"] > 0


# Bubbles -------------------------------------------------------------------------------------------------------------


def played(actions: str, stage: int = 0) -> list[Action]:
    """Of a rank with one stage: "F0 B0", two actions."""
    return [Action(kind, stage, int(micro_batch)) for kind, micro_batch in actions.split()]


def unit(action: Action) -> float:
    return UNITS[action.kind]


ORDERS: dict[str, tuple[list[list[Action]], float]] = {
    "1f1b": ([played("F0 F1 B0 B1"), played("F0 B0 F1 B1", 1)], 3 / 9),
    "gpipe": ([played("F0 F1 B0 B1"), played("F0 F1 B0 B1", 1)], 3 / 9),
    # weights' gradients where else would be waited: the first rank's first micro-batch, and the last one's way back
    "zero bubble": ([played("F0 F1 I0 W0 I1 W1"), played("F0 I0 F1 I1 W0 W1", 1)], 1 / 7),
    "one rank": ([played("F0 B0")], 0.0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_ranks_wait_for_what_they_need_alone(name: str) -> None:
    orders, share = ORDERS[name]
    assert idle(orders, unit) == pytest.approx(share)


def test_a_stage_that_takes_longer_is_waited_for() -> None:
    orders = ORDERS["1f1b"][0]
    # F 1 and B 2 in the first, twice that in the last: 0-1 F0, 1-2 F1; 1-3 F0, 3-7 B0, 7-9 F1, 9-13 B1; 13-15 B1
    assert idle(orders, lambda action: (1 + action.stage) * unit(action)) == pytest.approx(1 - (6 + 12) / 2 / 15)
    timed = [[Action("F", 0, 0, 5.0, 6.0, 0.5), Action("B", 0, 0, 9.0, 10.0, 1.0)], [Action("B", 1, 0, 6.0, 9.0, 2.5)]]
    timed[1].insert(0, Action("F", 1, 0, 6.0, 6.0, 0.0))
    assert shares([timed]).waited == pytest.approx(1 - (1 + 1 + 3) / 2 / 5)
    assert shares([timed]).costs == pytest.approx(1 - 4 / 2 / 4)


def test_an_order_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rank can go on"):
        idle([played("F0 B0"), played("B0 F0", 1)], unit)


# On paper ------------------------------------------------------------------------------------------------------------

MILLIARD = Shape(blocks=1_000_000_000, rest=0, n_blocks=10, small=0)
# 1e12 operations, 1e9 bytes a second everywhere, no latency: to be worked out by hand
PLAIN = Cluster("plain", across=1e9, flops=1e12, inside=1e9, hop_inside=0, hop_across=0)


def test_a_shape_is_what_a_model_has() -> None:
    with torch.device("meta"):
        assert Shape.of(GPT(GPTConfig(dim=64, n_layers=LAYERS))) == Shape(BLOCKS, REST, LAYERS, SMALL)


def test_time_by_hand() -> None:
    # 4 GPUs send 3/4 of 8e9 bytes in ddp: 6 s, beside a backward pass of 4e9 operations a token
    assert seconds("ddp", MILLIARD, PLAIN, 4, tokens=1000) == pytest.approx(2 + 6)
    assert seconds("ddp", MILLIARD, PLAIN, 4, tokens=3000) == pytest.approx(6 + 12)
    assert seconds("ddp", MILLIARD, PLAIN, 4, tokens=1000, micro_batches=3) == pytest.approx(2 * (2 + 4) + 2 + 6)
    # fsdp: 3/4 of 2e9 bytes forward (1.5 s); 2e9 and, in the last micro-batch, 4e9 backward (1.5 and 4.5 s)
    assert seconds("fsdp", MILLIARD, PLAIN, 4, tokens=500, micro_batches=2) == pytest.approx(2 * 1.5 + 2 + 4.5)
    # kept, one gather of each: 1.5 s forward; 3 s of gradients backward, beside 2
    assert seconds("fsdp kept", MILLIARD, PLAIN, 4, tokens=500, micro_batches=2) == pytest.approx(1 + 2 + 1.5 + 3)
    # ZeRO-1 waits for both: 3/4 of 4e9 bytes and of 2e9
    assert used("zero1", MILLIARD, PLAIN, 4, tokens=1000) == pytest.approx(6 / (6 + 4.5))
    assert tokens_for(0.9, "zero1", MILLIARD, PLAIN, 4) == pytest.approx(0.9 / 0.1 * 4.5 / 6 * 1000, rel=1e-3)


def test_across_nodes_by_hand() -> None:
    # two nodes of 8; 16 numbers of 1 byte; hops of 1 s inside and 10 s across
    slow = Cluster("slow", across=1.0, inside=100.0, hop_inside=1.0, hop_across=10.0)
    # the ring has 14 hops inside and one across, and goes at 8 GPUs' share of the network: 15 bytes at 8 a second
    assert transfer(T("all_gather", 1, 16, "forward"), slow, 16) == pytest.approx(14 + 10 + 15 / 8)
    # a tree there and back, 7 hops inside and log2(2) across
    assert transfer(T("all_reduce", 1, 16, "forward"), slow, 16) == pytest.approx(2 * (7 + 10) + 30 / 8)
    assert transfer(T("all_gather", 1, 16, "forward", messages=2, group="node"), slow, 16) == pytest.approx(14 + 0.14)
    assert transfer(T("all_reduce", 1, 16, "forward", group="nodes"), slow, 16) == pytest.approx(2 * 10 + 16 / 1)


def test_memory_and_bytes_by_hand() -> None:
    # 16 bytes a parameter, of which fsdp's rank keeps an eighth, and two gathered blocks and a block's gradients
    assert holds("ddp", MILLIARD, parts=8) == 18e9
    assert holds("fsdp", MILLIARD, parts=8) == 2e9 + 2 * 2e8 + 4e8
    assert holds("fsdp", MILLIARD, parts=8, micro_batches=4) == 2e9 + 2 * 2e8 + 4e9  # whole gradients meanwhile
    assert holds("fsdp kept", MILLIARD, parts=8) == 2e9 + 2e9 + 4e8
    assert holds("zero2", MILLIARD, parts=8) == 2e9 + 14e9 / 8 + 1e8
    assert bytes_sent("fsdp", MILLIARD, ranks=8, micro_batches=4) == 7 / 8 * (4 * 2 * 2e9 + 4e9)
    # hsdp on two nodes: gathers within one, and an eighth of the gradients to the other node and back
    assert bytes_sent("hsdp", MILLIARD, 16, 1) == 7 / 8 * (2 * 2e9 + 4e9) + 2 / 2 * 4e9 / 8


def test_the_tables_of_the_documentation_are_what_the_script_prints() -> None:
    written = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    missing = [part for part in tables().split("\n\n") if part not in written]
    assert not missing, "run `python scripts/scaling.py --paper`"
