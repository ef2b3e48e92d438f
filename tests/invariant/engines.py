"""What the tests of engines share: one process's runs, the same runs spread, and their comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from tests.helpers import BOTTLENECK, LORA, PREFIX, losses, metrics, stage_flags, train_here, train_many, train_start

STAGES = ("pretrain", "full_sft", "dpo", "kto", "distill", "reward", "dpo_lora")
LORA_START = "full_sft_lora"  # whose adapter the last goes on with
ADAPTERS = {"lora": LORA, "bottleneck": BOTTLENECK, "prefix": PREFIX}  # by the last word of a run's name
OTHERS = ("full_sft_bottleneck", "dpo_prefix")  # for the engines that say so
SPLIT = tuple(stage for stage in STAGES if stage != "distill")  # whose model may be split over ranks
STEPS = 8
Runs = Sequence[tuple[str, str, list[str]]]  # stage, name, flags


class Asked(NamedTuple):
    """An engine's flags, and the stages that it is asked for in every run of the tests; a drill asks for the others of
    those that it takes."""

    flags: list[str]
    stages: tuple[str, ...] = STAGES
    takes: tuple[str, ...] = STAGES


Engines = dict[str, Asked]


def meetings(engines: Engines, drill: bool = False) -> list[tuple[str, str]]:
    """(engine, stage), of every run of the tests or of the drill."""
    left = {name: [stage for stage in asked.takes if stage not in asked.stages] for name, asked in engines.items()}
    return [(name, stage) for name in engines for stage in (left[name] if drill else engines[name].stages)]


def train_alone(folder: Path) -> None:
    """Data, a model of the two stages before, and what one process makes of eight rows an update."""
    train_start(folder)
    for run in (*STAGES[:-1], LORA_START, STAGES[-1], *OTHERS):
        stage, flags = run_of(folder, run, "single", "--batch_size", 8)
        train_here(stage, *flags)


def run_of(base: Path, run: str, name: str, *flags: object) -> tuple[str, list]:
    """A stage and its flags."""
    stage, adapter = adapter_of(run)
    if adapter:
        start = ["--init_from", base / "single" / f"{LORA_START}_32"] if run == "dpo_lora" else []
        faster = ["--learning_rate", 3e-3] if run in OTHERS else []  # fewer parameters, and new ones
        flags = (*flags, "--run_name", f"{run}_32", *start, *adapter, *faster)
    # validation rows are fewer than ranks, and only rank 0 writes samples: neither may leave a rank behind
    steps = [
        "--max_steps",
        STEPS,
        "--learning_rate",
        3e-4,
        "--save_interval",
        5,
        "--eval_interval",
        4,
        "--sample_interval",
        7,
    ]
    if stage == "reward":
        flags = (*flags, "--sample_interval", 0)  # it writes nothing
    return stage, [*stage_flags(base, stage, base / name), *steps, *flags]


def adapter_of(run: str) -> tuple[str, list[str]]:
    """dpo_lora -> dpo, flags of LoRA."""
    stage, _, kind = run.rpartition("_")
    return (stage, ADAPTERS[kind]) if kind in ADAPTERS else (run, [])


def train_all(
    base: Path,
    engines: Engines,
    ranks: int,
    drill: bool = False,
    more: Runs = (),
    also: Sequence[tuple[str, list]] = (),
    **how: object,
) -> None:
    """Rows of very different weight: eight an update, two a micro-batch on two ranks, one on four. also: stages with
    all their flags, in the same processes."""
    split = ["--batch_size", 4 // ranks, "--accumulation_steps", 2]
    met = [(stage, engine, engines[engine].flags) for engine, stage in meetings(engines, drill)]
    runs = [run_of(base, stage, f"{name} x{ranks}", *split, *flags) for stage, name, flags in [*met, *more]]
    train_many(base, [*runs, *also], ranks, **how)


def same_as_alone(base: Path, name: str, stage: str, single: str = "single") -> None:
    alone, spread = losses(base / single, stage), losses(base / name, stage)
    assert len(alone) == STEPS and alone[STEPS] < alone[1]
    assert spread == pytest.approx(alone, rel=1e-5)
    norms = [[r["grad_norm"] for r in metrics(base / folder, stage)] for folder in (single, name)]
    assert norms[1] == pytest.approx(norms[0], rel=3e-6)
    val = [[r["val_loss"] for r in metrics(base / folder, stage) if "val_loss" in r] for folder in (single, name)]
    assert len(val[0]) == STEPS // 4 and val[1] == pytest.approx(val[0], rel=1e-5)
    file = "adapter_model.safetensors" if adapter_of(stage)[1] else "model.safetensors"
    weights = [load_file(base / folder / f"{stage}_32" / file) for folder in (single, name)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert (weights[1][key] - tensor).abs().max() < 1e-5, key
