"""Run by test_split_failures: train_pretrain.py, where one rank's stage fails by itself in its nth forward pass.

python tests/e2e/failing_stage.py N FLAGS...        N: 0 on the other ranks
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from torch import Tensor

import train_pretrain
from training import PretrainConfig
from training.command import run_stage
from training.engines.pipeline import Stage

_, fails_at, *sys.argv[1:] = sys.argv
forward = Stage.forward
passes = 0


def failing(self: Stage, x: Tensor, number: Tensor) -> Tensor:
    global passes
    passes += 1
    if passes == int(fails_at):
        raise IndexError("index 97 is out of bounds for dimension 0 with size 97")
    return forward(self, x, number)


Stage.forward = failing  # type: ignore[method-assign]
run_stage(train_pretrain.main, PretrainConfig)
