"""What drills of lost ranks and nodes share: a run of twenty steps, its launch lines, and when to strike."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from tests.e2e.nodes import Nodes
from tests.helpers import ROOT, TINY, all_cores, environment, free_port, losses

SCRIPT = str(ROOT / "train_pretrain.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# quicker than the defaults, with which a node counts as lost after 15 s and a smaller group waits 30 s for a larger one
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
STEPS = 20


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


def assert_undisturbed(base: Path, out: Path, whole: str = "whole") -> None:
    found, expected = losses(out, "pretrain"), losses(base / whole, "pretrain")
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == STEPS


def elastic(
    nodes: Nodes, node: int, host: int, command: list[str], group: str | None = None, processes: int = 1
) -> list[str]:
    """The launch line of a node of a group that may have one node or all of them, or of so many as `group` says."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "test", "--rdzv_endpoint", f"{nodes.address(host)}:29400"]
    # a namespace has no hostname of its own by which torchrun could tell who is the host
    settings = f"{QUICK},is_host={int(node == host)}"
    size = ["--nnodes", group or f"1:{nodes.count}", "--nproc_per_node", str(processes), "--max_restarts", "2"]
    return [*TORCHRUN, *size, *meeting, "--rdzv_conf", settings, "--local_addr", nodes.address(node), *command]


def by_hand(rank: int, address: str, port: int) -> dict[str, str]:
    """The environment of one of two ranks, each on a node of its own."""
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return environment(**ranks, MASTER_ADDR=address, MASTER_PORT=str(port))


class Ranks:
    """Ranks of one node without a launcher that would end the others where one ends; what each said is in its log."""

    def __init__(self, folder: Path, commands: list[list[Any]], **extra: str):
        """A Python script and its flags for every rank."""
        port, size = str(free_port()), str(len(commands))
        self.logs = [folder / f"log{rank}" for rank in range(len(commands))]
        self.processes = []
        with all_cores():
            for rank, (command, log) in enumerate(zip(commands, self.logs, strict=True)):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **extra)
                with open(log, "wb") as output:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, *map(str, command)], env=env, cwd=ROOT, stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait(self, rank: int, seconds: float = 60) -> int:
        """A rank's exit status. Raises AssertionError, with what it said, where it goes on for longer."""
        try:
            return self.processes[rank].wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"rank {rank} is silent, and has not ended: {self.said(rank)}") from None
