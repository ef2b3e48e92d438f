"""Every engine, in every stage, learns what one process learns: the same losses and the same exported weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import losses, stage_flags, train_here, train_many, train_start

STAGES = ("pretrain", "full_sft", "dpo")
STEPS = 12
TORCHRUN = {
    "ddp": ["--engine", "ddp"],
    "fsdp": ["--engine", "fsdp"],
    "fsdp, offload, checkpointing, async": ["--engine", "fsdp", "--offload", "cpu", "--grad_checkpointing", "--async_save"],
}  # fmt: skip
# stage 3 first: it must not live on what another stage has set up in the same process
DEEPSPEED = {f"zero{stage}": ["--zero_stage", str(stage)] for stage in (3, 0, 1, 2)} | {
    "zero2 offload": ["--zero_stage", "2", "--offload", "cpu", "--grad_checkpointing"],
    "zero3 offload": ["--zero_stage", "3", "--offload", "cpu", "--grad_checkpointing", "--async_save"],
}
FOUR = {"ddp": ["--engine", "ddp"], "fsdp, a copy a node": ["--engine", "fsdp", "--hsdp"]}
Check = Callable[[str, str], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model of the two stages before, and what one process makes of eight rows an update."""
    folder = tmp_path_factory.mktemp("engines")
    train_start(folder)
    for stage in STAGES:
        train_here(stage, *flags_of(folder, stage, "single", "--batch_size", 8))
    return folder


def flags_of(base: Path, stage: str, name: str, *flags: object) -> list:
    steps = ["--max_steps", STEPS, "--learning_rate", 3e-4, "--save_interval", 5]
    return [*stage_flags(base, stage, base / name), *steps, *flags]


def train_all(base: Path, engines: dict[str, list[str]], ranks: int, **how: object) -> Path:
    """Rows of very different weight: eight an update, two a micro-batch on two ranks, one on four."""
    split = ["--batch_size", 4 // ranks, "--accumulation_steps", 2]
    runs = [
        (stage, flags_of(base, stage, f"{name} x{ranks}", *split, *flags))
        for name, flags in engines.items()
        for stage in STAGES
    ]
    train_many(base, runs, ranks, **how)
    return base


def same_as_alone(base: Path, name: str, stage: str) -> None:
    alone, spread = losses(base / "single", stage), losses(base / name, stage)
    assert len(alone) == STEPS and alone[STEPS] < alone[1]
    assert spread == pytest.approx(alone, rel=1e-5)
    weights = [load_file(base / folder / f"{stage}_32" / "model.safetensors") for folder in ("single", name)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert (weights[1][key] - tensor).abs().max() < 1e-5, key


@pytest.fixture(scope="module")
def torchrun(base: Path) -> Path:
    return train_all(base, TORCHRUN, ranks=2)


@pytest.fixture(scope="module")
def deepspeed(base: Path) -> Path:
    return train_all(base, DEEPSPEED, ranks=2, deepspeed=True)


@pytest.fixture(scope="module")
def four(base: Path) -> Path:
    return train_all(base, FOUR, ranks=4, nodes=2)


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", TORCHRUN)
def test_two_ranks_under_torchrun(torchrun: Path, engine: str, stage: str) -> None:
    same_as_alone(torchrun, f"{engine} x2", stage)


@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_two_ranks_under_the_deepspeed_launcher(deepspeed: Path, engine: str, stage: str) -> None:
    same_as_alone(deepspeed, f"{engine} x2", stage)


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", FOUR)
def test_four_ranks_on_two_nodes(four: Path, engine: str, stage: str) -> None:
    same_as_alone(four, f"{engine} x4", stage)
