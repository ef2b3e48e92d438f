"""One update is one update, however it is split: 8 rows = 4 x 2 accumulated = 2 ranks x 4, in every stage."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import TINY, losses, make_data, run, train_here

STEPS = 12
SPLITS = {
    "8": (["--batch_size", 8], 1),
    "4x2": (["--batch_size", 4, "--accumulation_steps", 2], 1),
    "2 ranks x 2 x 2": (["--batch_size", 2, "--accumulation_steps", 2], 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model of the two stages before that all splits start from."""
    folder = tmp_path_factory.mktemp("same_numbers")
    data = make_data(folder)
    flags = ["--dim", 32, "--out_dir", folder / "start", "--cache_dir", folder / "cache", "--max_steps", 3]
    train_here("pretrain", "--data_path", data["pretrain"], *flags, *TINY)
    train_here("full_sft", "--data_path", data["full_sft"], *flags)
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "dpo"])
def test_loss_and_weights_do_not_depend_on_the_split(base: Path, stage: str) -> None:
    start = {
        "pretrain": TINY,
        "full_sft": ["--init_from", base / "start/pretrain_32"],
        "dpo": ["--init_from", base / "start/full_sft_32"],
    }
    data = base / {"pretrain": "pretrain.jsonl", "full_sft": "sft.jsonl", "dpo": "dpo.jsonl"}[stage]
    seen, weights = {}, {}
    for name, (split, ranks) in SPLITS.items():
        out = base / f"{stage} {name}"
        flags = ["--data_path", data, "--dim", 32, "--out_dir", out, "--cache_dir", base / "cache", "--max_steps", STEPS,
                 "--log_interval", 1, "--learning_rate", 3e-4, *split, *start[stage]]  # fmt: skip
        train_here(stage, *flags) if ranks == 1 else run(stage, *flags, ranks=ranks)
        seen[name] = losses(out, stage)
        weights[name] = load_file(out / f"{stage}_32" / "model.safetensors")
    assert len(seen["8"]) == STEPS and seen["8"][STEPS] < seen["8"][1]
    for name in SPLITS:
        assert seen[name] == pytest.approx(seen["8"], rel=1e-5), name
        for key, tensor in weights["8"].items():
            assert (weights[name][key] - tensor).abs().max() < 2e-5, (name, key)
