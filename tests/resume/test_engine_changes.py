"""A run that changes its engine and its number of ranks at every stop is the run that never did."""

from pathlib import Path

import pytest

from tests.helpers import LORA, losses, metrics, stage_flags, train_here, train_many, train_start

FLAT = ["--lr_schedule", "wsd", "--decay_fraction", 0, "--warmup_steps", 1, "--learning_rate", 1e-3, "--min_lr", 1e-3]
ZERO = ["--engine", "deepspeed", "--zero_stage"]
RUNS = {"pretrain": [], "full_sft": LORA}  # of an adapter, checkpoints hold that alone
FEWER = (3, 7, 11, 13, 18)  # stops of the adapter: another way of writing each


def test_every_engine_goes_on_from_every_other(tmp_path: Path) -> None:
    """torch's checkpoints resharded, DeepSpeed's own and its universal ones, written in the background and not."""
    train_start(tmp_path)

    def until(step: int, *flags: object, out: str = "mixed") -> list[tuple[str, list]]:
        # a flat learning rate, so that stopping early changes nothing but where the run stands
        rows = ["--global_batch_size", 8, "--batch_size", 2, "--max_steps", step]
        return [
            (stage, [*stage_flags(tmp_path, stage, tmp_path / out), *FLAT, *rows, *flags, *own])
            for stage, own in RUNS.items()
            if stage == "pretrain" or step in FEWER
        ]

    def train_alone(step: int, out: str) -> None:
        for stage, flags in until(step, out=out):
            train_here(stage, *flags)

    train_alone(18, "whole")
    train_alone(3, "mixed")
    two = [
        *until(5, "--engine", "fsdp", "--async_save", "--save_interval", 1),  # from one process's checkpoint
        *until(7, *ZERO, 2),  # from FSDP's
        *until(9, *ZERO, 2),  # DeepSpeed's own
        *until(11, *ZERO, 3, "--async_save", "--save_interval", 1),  # universal: another stage
        *until(13, "--engine", "ddp"),  # universal: another engine, from stage 3
    ]
    three = [*until(14, *ZERO, 1, "--offload", "cpu"), *until(15, *ZERO, 3)]
    said = train_many(tmp_path, two, ranks=2) + train_many(tmp_path, three, ranks=3)
    said += train_many(tmp_path, until(16, "--engine", "fsdp", "--offload", "cpu"), ranks=2)
    train_alone(18, "mixed")
    for stage in RUNS:
        for step in (3, 7, 11) if stage == "full_sft" else (3, 5, 7, 9, 11, 13, 14, 15):
            assert f"{stage}_32/checkpoints/step_{step:06d}" in said
        assert losses(tmp_path / "mixed", stage) == pytest.approx(losses(tmp_path / "whole", stage), rel=1e-5)
        tokens = [[record["tokens"] for record in metrics(tmp_path / name, stage)] for name in ("mixed", "whole")]
        assert tokens[0] == tokens[1] and len(tokens[0]) == 18
        checkpoints = tmp_path / "mixed" / f"{stage}_32" / "checkpoints"
        assert not list(checkpoints.glob(".*"))  # no universal form, no half-written folder is left
