"""The memory table: what a rank holds is what the ZeRO paper says it holds."""

import json
from typing import Any

import pytest

from tests.helpers import ROOT, launched

SHAPE = ["--dim", 256, "--n_layers", 4, "--device", "cpu", "--dtype", "float32"]
N = 4_458_752  # parameters of that shape
ENGINES = {
    "fsdp": (["--engine", "fsdp"], {"parameters": 4 * N / 2, "gradients": 4 * N / 2, "optimizer": 8 * N / 2}),
    # in float32 DeepSpeed keeps masters beside the parameters
    "zero1": (["--engine", "deepspeed", "--zero_stage", 1], {"parameters": 4 * N, "optimizer": 12 * N / 2}),
    "zero3": (["--engine", "deepspeed", "--zero_stage", 3], {"optimizer": 12 * N / 2}),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_hold_half_of_what_is_sharded(engine: str) -> None:
    flags, expected = ENGINES[engine]
    said = launched(ROOT / "scripts/memory.py", *SHAPE, *flags).stdout
    result: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert result["ranks"] == 2
    for part, size in expected.items():
        assert result["formula"][part] == size
        assert result["measured"][part] == pytest.approx(size, rel=1e-3), part
    if engine == "zero3":  # DeepSpeed leaves parameters below 100,000 elements whole
        assert result["measured"]["parameters"] < 0.7 * 4 * N and result["measured"]["gradients"] < 0.7 * 4 * N
