"""What a run survives, and how it ends where it cannot: lost workers and nodes, wrong addresses, disks not shared."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.drills import (
    SCRIPT,
    TORCHRUN,
    assert_undisturbed,
    by_hand,
    elastic,
    flags_of,
    reached,
    wait_until,
    worker_of,
)
from tests.e2e.nodes import Nodes, needs_namespaces
from tests.helpers import ROOT, environment, free_port, make_data, train_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, its tokenized cache, and one process's undisturbed run in whole/."""
    folder = tmp_path_factory.mktemp("elastic")
    make_data(folder)
    train_here("pretrain", *flags_of(folder, folder / "whole"))
    return folder


def test_a_killed_worker_is_started_again_and_the_losses_are_those_of_an_undisturbed_run(
    base: Path, tmp_path: Path
) -> None:
    """Though the command says --resume none, which was for the first start."""
    log = tmp_path / "log"
    launch = [*TORCHRUN, "--nproc_per_node", "2", "--max_restarts", "1", "--master_port", str(free_port()), SCRIPT]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*launch, *flags_of(base, tmp_path), "--engine", "fsdp", "--resume", "none"],
            env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(reached(tmp_path, 7), process, log)
        os.kill(worker_of(process, 1), signal.SIGKILL)
        assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait()
    assert "resumed from" in log.read_text()
    assert_undisturbed(base, tmp_path)


@needs_namespaces
@pytest.mark.parametrize("loss", [pytest.param("power", marks=pytest.mark.slow), "cable"])
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    base: Path, tmp_path: Path, loss: str
) -> None:
    log = tmp_path / "log0"
    command = [SCRIPT, *flags_of(base, tmp_path), "--comm_timeout", "5"]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Nodes(2) as nodes:
        first, _ = (
            nodes.start(node, elastic(nodes, node, 0, command), tmp_path / f"log{node}", env) for node in (0, 1)
        )
        wait_until(reached(tmp_path, 7), first, log)
        (nodes.kill if loss == "power" else nodes.cut)(1)
        assert first.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    assert "rank 0 lost contact with another rank" in said and "resumed from" in said
    assert_undisturbed(base, tmp_path)


@pytest.mark.slow
@needs_namespaces
def test_a_node_that_joins_later_changes_no_loss_though_it_becomes_the_first(base: Path, tmp_path: Path) -> None:
    """Ranks go by address, so the node that joins is rank 0 from then on, and hosts what the ranks meet at."""
    log = tmp_path / "log1"
    command = [SCRIPT, *flags_of(base, tmp_path)]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Nodes(2) as nodes:
        second = nodes.start(1, elastic(nodes, 1, 1, command), log, env)
        wait_until(reached(tmp_path, 2), second, log)
        # on a fast machine the run would else be over before the other node has started
        worker = worker_of(second, 0)
        os.kill(worker, signal.SIGSTOP)
        first = nodes.start(0, elastic(nodes, 0, 1, command), tmp_path / "log0", env)
        wait_until(lambda: "closing signal SIGTERM" in log.read_text(), second, log)
        os.kill(worker, signal.SIGCONT)
        assert [second.wait(timeout=120), first.wait(timeout=120)] == [0, 0], log.read_text()
    assert "the same command continues from here" in log.read_text()
    assert "resumed from" in (tmp_path / "log0").read_text()
    assert_undisturbed(base, tmp_path)


def test_an_address_where_nobody_is_ends_in_one_clear_line(base: Path, tmp_path: Path) -> None:
    port = free_port()
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags_of(base, tmp_path), "--comm_timeout", "1"],
        env=by_hand(1, "127.0.0.1", port), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: rank 1 of 2 could not meet the others at 127.0.0.1:{port} within 1 s")


def test_a_rank_that_waits_for_one_that_failed_says_so_in_one_line(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "cut of')
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *flags_of(base, tmp_path), *other],
            env=by_hand(rank, "127.0.0.1", port), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, other in enumerate([[], ["--data_path", str(broken)]])
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "error: rank 0 lost contact with another rank" in said[0] and "Traceback" not in said[0]
    assert f"error: {broken}:1: found broken JSON" in said[1] and "Traceback" not in said[1]


@needs_namespaces
def test_a_folder_that_one_node_does_not_see_is_an_error_on_every_node(base: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "out", [tmp_path / "log0", tmp_path / "log1"]
    out.mkdir()
    with Nodes(2) as nodes:
        command = [sys.executable, SCRIPT, *flags_of(base, out)]
        ranks = [
            nodes.start(node, command, logs[node], by_hand(node, nodes.address(0), 29500), own_disk=disk)
            for node, disk in enumerate([None, out])
        ]
        assert [rank.wait(timeout=120) for rank in ranks] == [2, 2]
    for log in logs:
        said = log.read_text()
        assert f"error: rank 1 does not see rank 0's {out}" in said and "Traceback" not in said
