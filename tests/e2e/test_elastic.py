"""What a run survives, and how it ends where it cannot: lost workers and nodes, wrong addresses, disks not shared."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.nodes import Nodes, needs_namespaces
from tests.helpers import ROOT, TINY, environment, free_port, losses, make_data, train_here

SCRIPT = str(ROOT / "train_pretrain.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# quicker than the defaults, with which a node counts as lost after 15 s and a smaller group waits 30 s for a larger one
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
STEPS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, its tokenized cache, and one process's undisturbed run in whole/."""
    folder = tmp_path_factory.mktemp("elastic")
    make_data(folder)
    train_here("pretrain", *flags_of(folder, folder / "whole"))
    return folder


def flags_of(base: Path, out: Path) -> list[str]:
    """With a global batch an update has the same rows on any number of processes, so that the losses must be equal."""
    files = ["--data_path", base / "pretrain.jsonl", "--cache_dir", base / "cache", "--out_dir", out]
    batch = ["--global_batch_size", 8, "--batch_size", 2, "--max_steps", STEPS]
    rest = ["--save_interval", 5, "--log_interval", 1, "--eval_interval", 0, "--comm_timeout", 20, *TINY]
    return [str(flag) for flag in [*files, "--dim", 32, *batch, *rest]]


def wait_until(done: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def reached(out: Path, step: int) -> Callable[[], bool]:
    """Whether a run has logged this step."""
    path = out / "pretrain_32" / "metrics.jsonl"
    return lambda: path.is_file() and any(json.loads(line)["step"] >= step for line in whole_lines(path))


def whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def worker_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank that a launcher started."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among the children of {launcher.pid}")


def assert_undisturbed(base: Path, out: Path) -> None:
    found, expected = losses(out, "pretrain"), losses(base / "whole", "pretrain")
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == STEPS


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


def elastic(nodes: Nodes, node: int, host: int, command: list[str]) -> list[str]:
    """The launch line of a node of a group that may have one node or all of them."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "test", "--rdzv_endpoint", f"{nodes.address(host)}:29400"]
    # a namespace has no hostname of its own by which torchrun could tell who is the host
    settings = f"{QUICK},is_host={int(node == host)}"
    group = ["--nnodes", f"1:{nodes.count}", "--nproc_per_node", "1", "--max_restarts", "2"]
    return [*TORCHRUN, *group, *meeting, "--rdzv_conf", settings, "--local_addr", nodes.address(node), *command]


@needs_namespaces
@pytest.mark.parametrize("loss", ["power", "cable"])
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


def by_hand(rank: int, address: str, port: int) -> dict[str, str]:
    """The environment of one of two ranks, each on a node of its own."""
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return environment(**ranks, MASTER_ADDR=address, MASTER_PORT=str(port))


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
