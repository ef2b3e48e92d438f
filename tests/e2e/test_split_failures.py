"""What a run whose model is split survives, and how it ends where it cannot: lost stages, tensor ranks and nodes."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.drills import (
    SCRIPT,
    TORCHRUN,
    Ranks,
    assert_undisturbed,
    elastic,
    flags_of,
    reached,
    wait_until,
    worker_of,
)
from tests.e2e.nodes import Nodes, needs_namespaces
from tests.helpers import ROOT, all_cores, environment, free_port, make_data, train_here

FAILING = str(ROOT / "tests/e2e/failing_stage.py")
FOUR = ["--n_layers", "4"]
SPLITS = {
    "pp2 ddp": (2, ["--pp", "2"]),
    "pp2 fsdp": (2, ["--pp", "2", "--engine", "fsdp"]),
    "pp2 zbv": (2, ["--pp", "2", "--pp_schedule", "zbv", *FOUR]),
    "tp2": (2, ["--tp", "2"]),
    "pp2 x tp2": (4, ["--pp", "2", "--tp", "2"]),
}
STRUCK = [("pp2 ddp", 0), ("pp2 ddp", 1), ("pp2 fsdp", 0), ("pp2 zbv", 1), ("tp2", 1), ("pp2 x tp2", 3)]
ENDLESS = ["--max_steps", "2000"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> Path:
    """The same folder, with one process's runs: whole/ of two layers, deep/ of four."""
    train_here("pretrain", *flags_of(base, base / "whole"))
    train_here("pretrain", *flags_of(base, base / "deep"), *FOUR)
    return base


def assert_says_one_was_lost(ranks: Ranks, rank: int) -> None:
    """In one line, which is the last, and exit status 2."""
    assert ranks.wait(rank) == 2, ranks.said(rank)
    said = ranks.said(rank)
    (error,) = [line for line in said.splitlines() if not re.match(r"pretrain|[┏┃┡│└━╇┩─┴┘┓ ]", line)]
    assert error.startswith(f"error: rank {rank} lost contact with another rank after step "), said
    assert error.endswith("the same command goes on from it (torchrun --max_restarts N does so by itself)"), said


@pytest.mark.slow
def test_a_stage_that_falls_silent_is_waited_for_no_longer_than_comm_timeout(base: Path, tmp_path: Path) -> None:
    """Its process lives on, so that no connection is closed; the other stage waits for what it would send."""
    count, split = SPLITS["pp2 x tp2"]
    with Ranks(
        tmp_path, [[SCRIPT, *flags_of(base, tmp_path), *split, *ENDLESS, "--comm_timeout", "10"]] * count
    ) as ranks:
        wait_until(reached(tmp_path, 2), ranks.processes[0], ranks.logs[0])
        ranks.processes[3].send_signal(signal.SIGSTOP)
        for rank in range(3):
            assert_says_one_was_lost(ranks, rank)
        assert any("Timed out waiting 10000ms" in ranks.said(rank) for rank in range(3))


def test_a_stage_that_fails_says_why_and_the_other_one_that_it_is_gone(base: Path, tmp_path: Path) -> None:
    """Of a schedule that would print all of itself as well."""
    split = ["--pp", "2", "--pp_schedule", "interleaved", *FOUR, *ENDLESS]
    with Ranks(tmp_path, [[FAILING, n, *flags_of(base, tmp_path), *split] for n in (0, 21)]) as ranks:
        assert ranks.wait(1) == 1 and "IndexError: index 97 is out of bounds" in ranks.said(1)
        assert_says_one_was_lost(ranks, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), STRUCK, ids=str)
def test_all_ranks_end_where_one_is_killed_and_say_so(base: Path, tmp_path: Path, name: str, victim: int) -> None:
    count, split = SPLITS[name]
    with Ranks(tmp_path, [[SCRIPT, *flags_of(base, tmp_path), *split, *ENDLESS]] * count) as ranks:
        wait_until(reached(tmp_path, 7), ranks.processes[0], ranks.logs[0])
        ranks.processes[victim].kill()
        for rank in set(range(count)) - {victim}:
            assert_says_one_was_lost(ranks, rank)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), STRUCK, ids=str)
def test_a_killed_part_is_started_again_and_the_losses_are_those_of_one_process(
    undisturbed: Path, tmp_path: Path, name: str, victim: int
) -> None:
    count, split = SPLITS[name]
    log = tmp_path / "log"
    group = ["--nproc_per_node", str(count), "--max_restarts", "1", "--master_port", str(free_port())]
    with open(log, "wb") as output, all_cores():
        process = subprocess.Popen(
            [*TORCHRUN, *group, SCRIPT, *flags_of(undisturbed, tmp_path), *split],
            env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(reached(tmp_path, 7), process, log)
        os.kill(worker_of(process, victim), signal.SIGKILL)
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait()
    assert "resumed from" in log.read_text()
    assert_undisturbed(undisturbed, tmp_path, "deep" if "zbv" in name else "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "others", "told"),
    [
        (["--tp", "1", "--engine", "fsdp"], ["--tp", "2", "--engine", "fsdp"], "--tp 1 but rank 0 has 2"),
        (["--pp", "1"], ["--pp", "2"], "--pp 1 but rank 0 has 2"),
        (["--pp", "2", "--pp_schedule", "gpipe"], ["--pp", "2"], "--pp_schedule 'gpipe' but rank 0 has '1f1b'"),
        (["--pp", "2", "--dim", "64"], ["--pp", "2"], "--dim 64 but rank 0 has 32"),
        (["--tp", "2", "--n_kv_heads", "1"], ["--tp", "2"], "--n_kv_heads 1 but rank 0 has 2"),
        (["--pp", "2", "--batch_size", "1"], ["--pp", "2"], "--batch_size 1 but rank 0 has 2"),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "",
)
def test_a_rank_that_splits_otherwise_is_named_before_any_group_is_made(
    base: Path, tmp_path: Path, own: list[str], others: list[str], told: str
) -> None:
    with Ranks(tmp_path, [[SCRIPT, *flags_of(base, tmp_path), *flags] for flags in (others, own)]) as ranks:
        assert [ranks.wait(rank) for rank in (0, 1)] == [2, 2]
        line = f"error: rank 1 has {told}; start every node with the same command and data\n"
        assert [ranks.said(rank) for rank in (0, 1)] == [line, line]


@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["power", "cable"])
def test_a_pipeline_over_two_nodes_waits_for_a_lost_one_to_come_back(
    undisturbed: Path, tmp_path: Path, loss: str
) -> None:
    """What is left cannot hold the model; with `--nnodes 2` torchrun meets again once there are two."""
    log, command = tmp_path / "log0", [SCRIPT, *flags_of(undisturbed, tmp_path), "--pp", "2"]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Nodes(2) as nodes:

        def start(node: int, name: str) -> subprocess.Popen:
            return nodes.start(node, elastic(nodes, node, 0, command, group="2"), tmp_path / name, env)

        first, _ = start(0, "log0"), start(1, "log1")
        wait_until(reached(tmp_path, 7), first, log)
        (nodes.kill if loss == "power" else nodes.cut)(1)
        wait_until(lambda: "rank 0 lost contact with another rank" in log.read_text(), first, log)
        nodes.kill(1)
        nodes.mend(1)
        start(1, "log1 again")
        assert first.wait(timeout=180) == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert_undisturbed(undisturbed, tmp_path)


@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize("split", [["--tp", "2"], ["--pp", "2"]], ids=" ".join)
def test_a_lost_node_leaves_fewer_data_ranks_and_the_same_losses(
    undisturbed: Path, tmp_path: Path, split: list[str]
) -> None:
    """Two nodes of two processes: tensor ranks are on one node, and stages on both."""
    log, command = tmp_path / "log0", [SCRIPT, *flags_of(undisturbed, tmp_path), *split]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Nodes(2) as nodes:
        first, _ = (
            nodes.start(node, elastic(nodes, node, 0, command, processes=2), tmp_path / f"log{node}", env)
            for node in (0, 1)
        )
        wait_until(reached(tmp_path, 7), first, log)
        nodes.kill(1)
        assert first.wait(timeout=180) == 0, log.read_text()
    said = log.read_text()
    assert "on 4 ranks" in said and "on 2 ranks" in said and "resumed from" in said
    assert_undisturbed(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "split", "told"),
    [
        (4, ["--tp", "4"], "--tp 4 does not divide n_kv_heads 2; of this model it may be 1, 2"),
        (
            4,
            ["--pp", "4"],
            "--pp 4 with --pp_stages_per_rank 1 makes 4 stages of at least one layer, and n_layers is 2;",
        ),
        (4, ["--tp", "3"], "--tp 3 x --pp 1 ranks hold one model between them, and the number of processes, 4, is no"),
        (
            2,
            ["--pp", "2", "--engine", "fsdp", "--pp_schedule", "zb"],
            "--pp_schedule zb makes gradients of weights apart",
        ),
        (
            2,
            ["--pp", "2", "--batch_size", "8"],
            "--pp_schedule 1f1b of 2 ranks takes at least 2 micro-batches an update",
        ),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "",
)
def test_what_cannot_be_split_is_one_line_a_rank_before_data_are_read(
    base: Path, tmp_path: Path, count: int, split: list[str], told: str
) -> None:
    cache = tmp_path / "cache"
    command = [SCRIPT, *flags_of(base, tmp_path / "out"), "--cache_dir", cache, *split]
    with Ranks(tmp_path, [command] * count) as ranks:
        assert [ranks.wait(rank) for rank in range(count)] == [2] * count
        for rank in range(count):
            assert re.fullmatch(f"error: {re.escape(told)}.*\n", ranks.said(rank)), ranks.said(rank)
    assert not cache.exists() and not (tmp_path / "out").exists()
