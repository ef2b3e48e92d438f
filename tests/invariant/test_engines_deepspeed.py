"""DeepSpeed's ZeRO, under its own launcher, learns in every stage what one process learns."""

from pathlib import Path

import pytest

from tests.invariant.engines import OTHERS, STAGES, same_as_alone, train_all, train_alone

# stage 3 first: it must not live on what another stage has set up in the same process
DEEPSPEED = {f"zero{stage}": ["--zero_stage", str(stage)] for stage in (3, 0, 1, 2)} | {
    "zero2 offload": ["--zero_stage", "2", "--offload", "cpu", "--grad_checkpointing"],
    "zero3 offload": ["--zero_stage", "3", "--offload", "cpu", "--grad_checkpointing", "--async_save"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    train_alone(folder)
    more = [(run, "zero3", DEEPSPEED["zero3"]) for run in OTHERS]
    train_all(folder, DEEPSPEED, ranks=2, more=more, deepspeed=True)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_two_ranks_under_the_deepspeed_launcher(base: Path, engine: str, stage: str) -> None:
    same_as_alone(base, f"{engine} x2", stage)


@pytest.mark.parametrize("run", OTHERS)
def test_parameters_in_parts_learn_other_adapters(base: Path, run: str) -> None:
    same_as_alone(base, "zero3 x2", run)
