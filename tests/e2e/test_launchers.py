"""The launch lines users type, with real launchers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import ROOT, TINY, environment, free_port, launched, losses, make_data, run, train_here, train_many

WEIGHTS = "model.safetensors"


def flags_of(folder: Path, out: Path) -> list[str]:
    data = make_data(folder)["pretrain"]
    flags = ["--data_path", data, "--cache_dir", folder / "cache", "--out_dir", out, "--dim", 32, "--max_steps", 4]
    return [str(flag) for flag in [*flags, "--batch_size", 2, "--log_interval", 1, *TINY]]


def test_the_deepspeed_launcher_starts_the_script_under_zero_2(tmp_path: Path) -> None:
    """Without a word about the engine; the --local_rank that the launcher adds is accepted."""
    flags = flags_of(tmp_path, tmp_path / "launched")
    launched(ROOT / "train_pretrain.py", *flags, deepspeed=True)
    checkpoint = tmp_path / "launched" / "pretrain_32" / "checkpoints" / "step_000004" / "state"
    assert json.loads((checkpoint / "form.json").read_text())["stage"] == 2
    assert len(list(checkpoint.glob("deepspeed/*_optim_states.pt"))) == 2  # each rank's part
    train_here("pretrain", *flags, "--out_dir", tmp_path / "alone", "--accumulation_steps", 2)
    assert losses(tmp_path / "launched", "pretrain") == pytest.approx(losses(tmp_path / "alone", "pretrain"), rel=1e-5)


@pytest.mark.parametrize(
    "engine", [["fsdp"], ["deepspeed", "--zero_stage", "3", "--offload", "cpu"]], ids=lambda e: e[0]
)
def test_a_sharded_engine_needs_no_launcher(tmp_path: Path, engine: list[str]) -> None:
    flags = flags_of(tmp_path, tmp_path / "out")
    run("pretrain", *flags, "--engine", *engine)
    train_here("pretrain", *flags, "--out_dir", tmp_path / "alone")
    assert losses(tmp_path / "out", "pretrain") == pytest.approx(losses(tmp_path / "alone", "pretrain"), rel=1e-5)


def test_ranks_started_with_different_settings_are_told_so(tmp_path: Path) -> None:
    """Two processes by hand, as two nodes would be, one with another batch size."""
    flags = flags_of(tmp_path, tmp_path / "out")
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_pretrain.py"), *flags, "--batch_size", size],
            env=environment(
                RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, size in enumerate(["2", "3"])
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "rank 1 has --batch_size 3 but rank 0 has 2" in err, err


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    done = launched(ROOT / "tests/e2e/ranks.py", tmp_path_factory.mktemp("ranks") / "state")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["engine"]: line for line in lines}


# of two blocks and the rest, fully_shard sums each by itself; ZeRO-2 and 3 give gradients away in every micro-batch
REDUCTIONS = {"ddp": 1, "fsdp": 3, "zero0": 1, "zero1": 1, "zero2": 3, "zero2 offload": 3, "zero3": 3}


@pytest.mark.parametrize("engine", REDUCTIONS)
def test_ranks_stay_equal_reduce_once_an_update_and_skip_a_bad_one(ranks: dict[str, Any], engine: str) -> None:
    """Two ranks, three accumulated micro-batches."""
    assert ranks[engine]["difference"] == 0 and ranks[engine]["generator's difference"] < 1e-5
    assert ranks[engine]["reductions"] == REDUCTIONS[engine]
    assert ranks[engine]["bad update left no trace"] and ranks[engine]["state by name"]
    assert ranks[engine]["loss"] == pytest.approx(ranks["ddp"]["loss"], rel=1e-5)


@pytest.mark.parametrize("engine", REDUCTIONS)
def test_decay_and_betas_stay_the_runs_own_when_a_checkpoint_is_loaded(ranks: dict[str, Any], engine: str) -> None:
    assert ranks[engine]["settings are its own"]


def test_ranks_agree_on_the_best_model_whoever_holds_its_weights(tmp_path: Path) -> None:
    """Every validation is better than the one before, so that the best model is the last one."""
    engines = {
        "fsdp": ["--engine", "fsdp", "--async_save", "--save_interval", 2],
        "zero3": ["--engine", "deepspeed", "--zero_stage", 3],
    }
    keep = ["--keep_best", "val_loss", "--patience", 2, "--eval_interval", 2, "--eval_rows", 4, "--val_fraction", 0.2]
    runs = [
        ("pretrain", [*flags_of(tmp_path, tmp_path), *keep, "--run_name", name, *engines[name]]) for name in engines
    ]
    said = train_many(tmp_path, runs)
    for name in engines:
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        values = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
        assert len(values) > 1 and list(values.values()) == sorted(values.values(), reverse=True)
        found = json.loads((tmp_path / name / "best/best.json").read_text())
        assert (found["step"], found["value"]) == (max(values), min(values.values()))
        last, best = load_file(tmp_path / name / WEIGHTS), load_file(tmp_path / name / "best" / WEIGHTS)
        assert all(torch.equal(last[key], best[key]) for key in last)
        assert f"val_loss {found['value']:.4f} of step {found['step']} is the best so far: kept in" in said


def test_a_saved_config_runs_again_and_gives_the_same_losses(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, tmp_path / "first")
    train_here("pretrain", *flags)
    saved = tmp_path / "first" / "pretrain_32" / "config.yaml"
    train_here("pretrain", "--config", saved, "--out_dir", tmp_path / "second")
    assert losses(tmp_path / "second", "pretrain").keys() == losses(tmp_path / "first", "pretrain").keys()
    for step, loss in losses(tmp_path / "first", "pretrain").items():
        assert abs(losses(tmp_path / "second", "pretrain")[step] - loss) < 1e-5 * loss


@pytest.mark.parametrize(
    "launcher", [pytest.param("torch.distributed.launch", marks=pytest.mark.slow), "accelerate.commands.launch"]
)
def test_other_launchers_start_the_same_run_as_torchrun(tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(launcher.split(".")[0])
    options = {
        "torch.distributed.launch": ["--nproc_per_node", "2", "--master_port", str(free_port())],
        # its --cpu starts one process; this starts two, on GPUs where there are any
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())],
    }
    flags = flags_of(tmp_path, tmp_path / "launched")
    done = subprocess.run(
        [sys.executable, "-m", launcher, *options[launcher], str(ROOT / "train_pretrain.py"), *flags],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    train_here("pretrain", *flags, "--out_dir", tmp_path / "alone", "--accumulation_steps", 2)
    assert losses(tmp_path / "launched", "pretrain") == pytest.approx(losses(tmp_path / "alone", "pretrain"), rel=1e-5)
