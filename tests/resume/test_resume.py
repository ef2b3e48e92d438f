"""A resumed run is the uninterrupted run: bit for bit on one CPU process, every row once on any number of ranks."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import (
    LORA,
    PREFIX,
    ROOT,
    command,
    environment,
    launched,
    losses,
    metrics,
    run_here,
    stage_flags,
    train_here,
    train_start,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    train_start(folder)
    return folder


def flags_of(base: Path, stage: str, out: Path) -> list:
    # dropout, so that the random state matters
    training = ["--batch_size", 2, "--learning_rate", 1e-3, "--dropout", 0.1, "--save_interval", 5, "--epochs", 3]
    return [*stage_flags(base, stage, out), *training]


@pytest.mark.parametrize(
    "stage,flags",
    [
        ("pretrain", ["--optimizer", "muon"]),
        ("full_sft", []),
        ("dpo", []),
        ("kto", []),
        ("distill", []),
        ("distill", ["--on_policy", "--batch_size", 8, "--epochs", 2, "--max_new_tokens", 8]),
        ("reward", []),
        ("grpo", ["--batch_size", 4, "--epochs", 1, "--inner_epochs", 2, "--kl", 0.1, "--eval_interval", 6]),
        ("ppo", ["--batch_size", 4, "--epochs", 1, "--inner_epochs", 2, "--eval_interval", 6]),
        ("full_sft", [*LORA, "--lora_dropout", 0.1]),
        ("dpo", PREFIX),
    ],
    ids=[
        "pretrain",
        "full_sft",
        "dpo",
        "kto",
        "distill",
        "distill on policy",
        "reward",
        "grpo",
        "ppo",
        "lora",
        "prefix",
    ],
)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    base: Path, tmp_path: Path, stage: str, flags: list, capfd: Any
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(stage, *flags_of(base, stage, whole), *flags, "--keep_last", 100)
    assert len(losses(whole, stage)) > 10
    # the same run, its later checkpoints lost, as after a kill between two saves
    shutil.copytree(whole, cut)
    for folder in (cut / f"{stage}_32" / "checkpoints").glob("step_*"):
        if folder.name > "step_000005":
            shutil.rmtree(folder)
    train_here(stage, *flags_of(base, stage, cut), *flags)
    captured = capfd.readouterr()
    assert "resumed from" in captured.out + captured.err and "step_000005" in captured.out + captured.err
    assert losses(cut, stage) == losses(whole, stage)
    file = f"{'adapter_' if '--adapter' in flags else ''}model.safetensors"
    a, b = (load_file(folder / f"{stage}_32" / file) for folder in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_number_of_ranks_sees_every_row_once(base: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 1 ranks at one global batch: losses and tokens are those of one rank throughout, so the rows are."""
    # a flat learning rate, so that stopping early changes nothing but where the run stands
    flat = ["--lr_schedule", "wsd", "--decay_fraction", 0, "--warmup_steps", 1, "--min_lr", 1e-3, "--dropout", 0]
    whole = [*flags_of(base, "pretrain", tmp_path / "whole"), *flat]
    mixed = [*flags_of(base, "pretrain", tmp_path / "mixed"), *flat]
    train_here("pretrain", *whole, "--accumulation_steps", 2, "--max_steps", 15)
    train_here("pretrain", *mixed, "--accumulation_steps", 2, "--max_steps", 5)
    launched(ROOT / "train_pretrain.py", *mixed, "--accumulation_steps", 1, "--max_steps", 10)
    train_here("pretrain", *mixed, "--accumulation_steps", 2, "--max_steps", 15)
    assert losses(tmp_path / "mixed", "pretrain") == pytest.approx(losses(tmp_path / "whole", "pretrain"), rel=1e-5)
    tokens = [[record["tokens"] for record in metrics(tmp_path / name, "pretrain")] for name in ("mixed", "whole")]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 15


def test_a_changed_setting_that_breaks_the_run_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    flags = [*flags_of(base, "pretrain", tmp_path), "--max_steps", 5]
    train_here("pretrain", *flags)
    done = run_here("pretrain", *flags, "--seed", 7)
    assert done.returncode == 2 and "seed" in done.stderr and "--resume none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly_and_the_same_command_goes_on(base: Path, tmp_path: Path, number: int) -> None:
    flags = [*flags_of(base, "pretrain", tmp_path / "cut"), "--max_steps", 400, "--save_interval", 0]
    process = subprocess.Popen(
        command("pretrain", *flags), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "cut" / "pretrain_32" / "metrics.jsonl", 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "the same command continues" in out + err
    stopped = max(losses(tmp_path / "cut", "pretrain"))
    assert (tmp_path / "cut" / "pretrain_32" / "checkpoints" / f"step_{stopped:06d}" / "COMPLETE").is_file()
    assert stopped < 400


def wait_for_step(path: Path, step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and any(
            json.loads(line)["step"] >= step for line in path.read_text().splitlines() if line.endswith("}")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach step {step} in {seconds} s")
