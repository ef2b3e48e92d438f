"""The memory table: what a rank holds is what the ZeRO paper says it holds."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import ROOT, environment, train_many

SHAPE = ["--dim", 256, "--n_layers", 4, "--device", "cpu", "--dtype", "float32"]
N = 4_458_752  # parameters of that shape
LEARNT = (
    4 * 16 * (2 * (256 + 256) + 2 * (256 + 64) + 3 * (256 + 704))
)  # of them by LoRA: A and B of seven layers a block
TABLE, NORM = 6400 * 256, 256
BLOCK = (N - TABLE - NORM) // 4
HALF = ["--pp", 2, "--accumulation_steps", 4, "--dtype", "bfloat16"]
ENGINES = {  # DeepSpeed's last: it leaves something behind in the process
    # the head costs as much as two of these blocks, so that the first stage has three of them
    "pp": (["--engine", "ddp", *HALF], {"parameters": 4 * (3 * BLOCK + TABLE), "optimizer": 8 * (3 * BLOCK + TABLE)}),
    "pp, gpipe": (["--engine", "ddp", *HALF, "--pp_schedule", "gpipe"], {}),
    "fsdp": (["--engine", "fsdp"], {"parameters": 4 * N / 2, "gradients": 4 * N / 2, "optimizer": 8 * N / 2}),
    "lora": (
        ["--engine", "fsdp", "--adapter", "lora"],
        {"parameters": 4 * (N + LEARNT) / 2, "gradients": 4 * LEARNT / 2, "optimizer": 8 * LEARNT / 2},
    ),
    # tensor ranks have matrices in parts, norms whole
    "tp": (["--engine", "fsdp", "--tp", 2], {"parameters": 4 * (N - 9 * NORM) / 2 + 4 * 9 * NORM}),
    # in float32 DeepSpeed keeps masters beside the parameters
    "zero1": (["--engine", "deepspeed", "--zero_stage", 1], {"parameters": 4 * N, "optimizer": 12 * N / 2}),
    "zero3": (["--engine", "deepspeed", "--zero_stage", 3], {"optimizer": 12 * N / 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    runs = [("memory", [*SHAPE, *flags]) for flags, _ in ENGINES.values()]
    said = train_many(tmp_path_factory.mktemp("memory"), runs)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return dict(zip(ENGINES, lines, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_hold_half_of_what_is_sharded(results: dict[str, dict[str, Any]], engine: str) -> None:
    result, expected = results[engine], ENGINES[engine][1]
    assert result["ranks"] == 2
    for part, size in expected.items():
        assert result["formula"][part] == size
        assert result["measured"][part] == pytest.approx(size, rel=1e-3), part
    if engine == "zero3":  # DeepSpeed leaves parameters below 100,000 elements whole
        assert result["measured"]["parameters"] < 0.7 * 4 * N and result["measured"]["gradients"] < 0.7 * 4 * N


def test_every_stage_holds_its_own_and_what_its_schedule_leaves(results: dict[str, dict[str, Any]]) -> None:
    first, last = results["pp"]["stages"]
    assert first["formula"]["parameters"] == results["pp"]["formula"]["parameters"]
    assert last["formula"]["parameters"] == 4 * (BLOCK + TABLE + NORM)
    for stage in (first, last):
        for part, size in stage["formula"].items():
            assert stage["measured"][part] == pytest.approx(size, rel=0.12 if part == "activations" else 1e-3), part
        assert stage["measured"]["buffers"] < 1000  # nothing that was received stays behind an update
    # of four micro-batches 1f1b's first stage keeps two at a time and its last one; gpipe keeps all
    told = [stage["formula"]["messages"] for stage in results["pp, gpipe"]["stages"]]
    assert told == [6 * 128 * NORM * 4, 4 * 128 * NORM * 4]  # all that is sent, and of the first gradients that come in
    assert [stage["measured"]["messages"] for stage in results["pp, gpipe"]["stages"]] == pytest.approx(told, rel=1e-3)
    more = [stage["measured"]["activations"] for stage in results["pp, gpipe"]["stages"]]
    assert more[0] == 2 * first["measured"]["activations"]
    assert more[1] == pytest.approx(4 * last["measured"]["activations"], rel=1e-2)


def test_it_runs_as_a_script() -> None:
    command = [sys.executable, ROOT / "scripts/memory.py", "--dim", 32, "--n_layers", 1, *SHAPE[4:]]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["ranks"] == 1
