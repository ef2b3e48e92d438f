"""One update is one update, however one process splits it: 8 rows = 4 x 2 accumulated, in every stage."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import losses, metrics, stage_flags, train_here, train_start

STEPS = 12
SPLITS = {
    "8": ["--batch_size", 8],
    "4 x 2": ["--batch_size", 4, "--accumulation_steps", 2],
    "3 x 3, the last row left empty": ["--batch_size", 3, "--global_batch_size", 8],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model of the two stages before that all splits start from."""
    folder = tmp_path_factory.mktemp("same_numbers")
    train_start(folder)
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "dpo", "kto", "distill", "reward"])
def test_loss_and_weights_do_not_depend_on_the_split(base: Path, stage: str) -> None:
    seen, weights, kl = {}, {}, {}
    for name, split in SPLITS.items():
        out = base / f"{stage} {name}"
        flags = [*stage_flags(base, stage, out), "--max_steps", STEPS, "--learning_rate", 3e-4, *split]
        train_here(stage, *flags)
        seen[name] = losses(out, stage)
        kl[name] = [record.get("kl", 0.0) for record in metrics(out, stage)]
        weights[name] = load_file(out / f"{stage}_32" / "model.safetensors")
    assert len(seen["8"]) == STEPS and seen["8"][STEPS] < seen["8"][1]
    assert (max(kl["8"]) > 0.1) == (stage == "kto")  # a number that is measured before an update, of all its rows
    for name in SPLITS:
        assert kl[name] == pytest.approx(kl["8"], rel=1e-4, abs=1e-4), name
        assert seen[name] == pytest.approx(seen["8"], rel=1e-5), name
        for key, tensor in weights["8"].items():
            assert (weights[name][key] - tensor).abs().max() < 2e-5, (name, key)
