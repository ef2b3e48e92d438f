"""DDP and FSDP2 learn in every stage what one process learns: the same losses and the same exported weights."""

from pathlib import Path

import pytest

from tests.helpers import train_here
from tests.invariant.engines import OTHERS, STAGES, run_of, same_as_alone, train_all, train_alone

TORCHRUN = {
    "ddp": ["--engine", "ddp"],
    "fsdp": ["--engine", "fsdp"],
    "fsdp, kept gathered": ["--engine", "fsdp", "--fsdp_reshard", "no"],
    "fsdp, offload, checkpointing, async": [
        "--engine", "fsdp", "--offload", "cpu", "--grad_checkpointing", "--async_save",
    ],
}  # fmt: skip
TOP_K = ["--teacher_top_k", "16", "--distill_loss", "jsd", "--distill_temperature", "2", "--ce_weight", "0.3"]
FOUR = {"ddp": ["--engine", "ddp"], "fsdp, a copy a node": ["--engine", "fsdp", "--hsdp"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    train_alone(folder)
    stage, flags = run_of(folder, "distill", "top k", *TOP_K, "--batch_size", 8)
    train_here(stage, *flags)
    more = [("distill", "top k", [*TOP_K, "--cache_dir", f"{folder}/none yet"])]
    more += [(run, name, TORCHRUN[name]) for run in OTHERS for name in ("ddp", "fsdp")]
    train_all(folder, TORCHRUN, ranks=2, more=more)
    train_all(folder, FOUR, ranks=4, nodes=2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", TORCHRUN)
def test_two_ranks(base: Path, engine: str, stage: str) -> None:
    same_as_alone(base, f"{engine} x2", stage)


@pytest.mark.parametrize("run", OTHERS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_learn_other_adapters(base: Path, engine: str, run: str) -> None:
    same_as_alone(base, f"{engine} x2", run)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", FOUR)
def test_four_ranks_on_two_nodes(base: Path, engine: str, stage: str) -> None:
    same_as_alone(base, f"{engine} x4", stage)


def test_ranks_ask_a_teacher_ahead_side_by_side(base: Path) -> None:
    same_as_alone(base, "top k x2", "distill", single="top k")
