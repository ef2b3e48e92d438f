"""DeepSpeed's ZeRO, under its own launcher, learns in every stage what one process learns.

Every run of the tests asks ZeRO-3 for every stage, and each other ZeRO for one; the drill asks for the others.
"""

from pathlib import Path

import pytest

from tests.invariant.engines import OTHERS, STAGES, Asked, meetings, same_as_alone, train_all, train_alone
from tests.invariant.rollouts import rollout_runs, same_rollouts_as_alone, train_rollouts_alone

# stage 3 first: it must not live on what another stage has set up in the same process
DEEPSPEED = {
    "zero3": Asked(["--zero_stage", "3"], (*STAGES, *OTHERS)),
    "zero0": Asked(["--zero_stage", "0"], ("pretrain",)),
    "zero1": Asked(["--zero_stage", "1"], ("distill",)),
    "zero2": Asked(["--zero_stage", "2"], ("kto",)),
    "zero2 offload": Asked(["--zero_stage", "2", "--offload", "cpu", "--grad_checkpointing"], ("dpo_lora",)),
    "zero3 offload": Asked(
        ["--zero_stage", "3", "--offload", "cpu", "--grad_checkpointing", "--async_save"], ("full_sft",)
    ),
}  # fmt: skip
ROLLOUTS = {"zero2": ("plain", "filtered"), "zero3": ("unfiltered", "lora", "taught")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    train_alone(folder)
    train_rollouts_alone(folder)
    return folder


@pytest.fixture(scope="module")
def spread(alone: Path) -> Path:
    rollouts = [
        run
        for name, kinds in ROLLOUTS.items()
        for run in rollout_runs(alone, f"{name} x2", 2, *DEEPSPEED[name].flags, wanted=kinds)
    ]
    train_all(alone, DEEPSPEED, ranks=2, also=rollouts, deepspeed=True)
    return alone


@pytest.fixture(scope="module")
def drilled(alone: Path) -> Path:
    train_all(alone, DEEPSPEED, ranks=2, drill=True, deepspeed=True)
    return alone


@pytest.mark.parametrize(("engine", "stage"), meetings(DEEPSPEED))
def test_two_ranks_under_the_deepspeed_launcher(spread: Path, engine: str, stage: str) -> None:
    same_as_alone(spread, f"{engine} x2", stage)


@pytest.mark.parametrize(("engine", "kind"), [(name, kind) for name, kinds in ROLLOUTS.items() for kind in kinds])
def test_two_ranks_draw_the_answers_of_one(spread: Path, engine: str, kind: str) -> None:
    same_rollouts_as_alone(spread, f"{engine} x2", kind)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), meetings(DEEPSPEED, drill=True))
def test_every_stage_under_every_zero(drilled: Path, engine: str, stage: str) -> None:
    same_as_alone(drilled, f"{engine} x2", stage)
