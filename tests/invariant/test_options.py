"""Options that must not change what is learnt: checkpointed activations, compiled blocks, precision, the optimizer."""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY, losses, make_data, train_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_data(folder)
    train(folder, "plain")
    return folder


def train(folder: Path, name: str, *flags: object) -> dict[int, float]:
    common = ["--data_path", folder / "pretrain.jsonl", "--cache_dir", folder / "cache", "--out_dir", folder / name]
    train_here(
        "pretrain", *common, "--dim", 32, *TINY, "--batch_size", 4, "--max_steps", 8, "--log_interval", 1, *flags
    )
    return losses(folder / name, "pretrain")


def test_checkpointed_activations_change_nothing(base: Path) -> None:
    assert train(base, "checkpointed", "--grad_checkpointing") == pytest.approx(
        losses(base / "plain", "pretrain"), rel=1e-6
    )


def test_compiled_blocks_give_the_same_losses(base: Path) -> None:
    eager, compiled = train(base, "one", "--n_layers", 1), train(base, "compiled", "--n_layers", 1, "--compile")
    assert compiled == pytest.approx(eager, rel=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_full_precision(base: Path, dtype: str) -> None:
    """Weights and optimizer stay in float32; float16 scales its loss, and skips updates until the scale fits."""
    half, full = train(base, dtype, "--dtype", dtype), losses(base / "plain", "pretrain")
    assert all(math.isfinite(loss) for loss in half.values())
    assert half[1] == pytest.approx(full[1], rel=1e-2)
    assert half[8] < half[1]


def test_muon_learns(base: Path) -> None:
    muon = train(base, "muon", "--optimizer", "muon", "--learning_rate", 5e-3)
    assert muon[1] == losses(base / "plain", "pretrain")[1] and muon[8] < muon[1] - 0.3
