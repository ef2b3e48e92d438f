"""DDP and FSDP2 learn in every stage what one process learns: the same losses and the same exported weights.

Every run of the tests asks either for every stage on two ranks; their options, models that are split, and four ranks,
for one or none: the drill asks for the others.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers import train_here
from tests.invariant.engines import (
    OTHERS,
    SPLIT,
    STAGES,
    Asked,
    meetings,
    run_of,
    same_as_alone,
    train_all,
    train_alone,
)
from tests.invariant.rollouts import (
    KINDS,
    rollout_runs,
    rollouts_tell_something,
    same_rollouts_as_alone,
    train_rollouts_alone,
)

BOTTLENECK, _ = OTHERS


def split(rows: int, *flags: str) -> list[str]:
    """Eight rows an update of ranks that have so many at a time, two a micro-batch."""
    return [*flags, "--batch_size", "2", "--accumulation_steps", str(rows // 2)]


TORCHRUN = {
    "ddp": Asked(["--engine", "ddp"], (*STAGES, *OTHERS)),
    "fsdp": Asked(["--engine", "fsdp"], (*STAGES, *OTHERS)),
    "fsdp, kept gathered": Asked(["--engine", "fsdp", "--fsdp_reshard", "no"], ("kto",)),
    "fsdp, offload, checkpointing, async": Asked(
        ["--engine", "fsdp", "--offload", "cpu", "--grad_checkpointing", "--async_save"], ("full_sft", "dpo_lora")
    ),
    "tp2": Asked(split(8, "--tp", "2"), ("dpo_lora",), (*SPLIT, BOTTLENECK)),
    "pp2, ddp": Asked(split(8, "--engine", "ddp", "--pp", "2"), ("reward",), (*SPLIT, *OTHERS)),
    "pp2, fsdp, checkpointing, async": Asked(
        split(8, "--engine", "fsdp", "--pp", "2", "--grad_checkpointing", "--async_save"), (), (*SPLIT, *OTHERS)
    ),
}
ROLLOUTS = {"ddp": KINDS, "fsdp": ("filtered", "ppo", "taught")}
TOP_K = ["--teacher_top_k", "16", "--distill_loss", "jsd", "--distill_temperature", "2", "--ce_weight", "0.3"]
FOUR = {
    "ddp": Asked(["--engine", "ddp"], ("kto",)),
    "fsdp, a copy a node": Asked(["--engine", "fsdp", "--hsdp"], ("distill",)),
    "tp2 x fsdp2, async": Asked(split(4, "--tp", "2", "--async_save"), ("kto",), SPLIT),
    "pp2 x ddp2": Asked(split(4, "--engine", "ddp", "--pp", "2"), (), (*SPLIT, *OTHERS)),
    "pp2 x tp2": Asked(split(8, "--tp", "2", "--pp", "2"), (), SPLIT),
}


def drawn(base: Path, engine: str, kinds: Sequence[str]) -> list[tuple[str, list]]:
    return rollout_runs(base, f"{engine} x2", 2, *TORCHRUN[engine].flags, wanted=kinds)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    train_alone(folder)
    stage, flags = run_of(folder, "distill", "top k", *TOP_K, "--batch_size", 8)
    train_here(stage, *flags)
    train_rollouts_alone(folder)
    return folder


@pytest.fixture(scope="module")
def spread(alone: Path) -> Path:
    rollouts = [run for name, kinds in ROLLOUTS.items() for run in drawn(alone, name, kinds)]
    more = [("distill", "top k", [*TOP_K, "--cache_dir", f"{alone}/none yet"])]
    train_all(alone, TORCHRUN, ranks=2, more=more, also=rollouts)
    train_all(alone, FOUR, ranks=4, nodes=2)
    return alone


@pytest.fixture(scope="module")
def drilled(alone: Path) -> Path:
    rollouts = drawn(alone, "fsdp", [kind for kind in KINDS if kind not in ROLLOUTS["fsdp"]])
    train_all(alone, TORCHRUN, ranks=2, drill=True, also=rollouts)
    train_all(alone, FOUR, ranks=4, drill=True, nodes=2)
    return alone


@pytest.mark.parametrize(("engine", "stage"), meetings(TORCHRUN))
def test_two_ranks(spread: Path, engine: str, stage: str) -> None:
    same_as_alone(spread, f"{engine} x2", stage)


@pytest.mark.parametrize(("engine", "stage"), meetings(FOUR))
def test_four_ranks_on_two_nodes(spread: Path, engine: str, stage: str) -> None:
    same_as_alone(spread, f"{engine} x4", stage)


def test_ranks_ask_a_teacher_ahead_side_by_side(spread: Path) -> None:
    same_as_alone(spread, "top k x2", "distill", single="top k")


@pytest.mark.parametrize(("engine", "kind"), [(name, kind) for name, kinds in ROLLOUTS.items() for kind in kinds])
def test_two_ranks_draw_the_answers_of_one(spread: Path, engine: str, kind: str) -> None:
    same_rollouts_as_alone(spread, f"{engine} x2", kind)


def test_rollouts_tell_something(alone: Path) -> None:
    rollouts_tell_something(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "engine", "stage"),
    [(ranks, *each) for ranks, engines in ((2, TORCHRUN), (4, FOUR)) for each in meetings(engines, drill=True)],
)
def test_every_stage_with_every_option(drilled: Path, ranks: int, engine: str, stage: str) -> None:
    same_as_alone(drilled, f"{engine} x{ranks}", stage)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROLLOUTS["fsdp"]])
def test_every_rollout_under_fsdp(drilled: Path, kind: str) -> None:
    same_rollouts_as_alone(drilled, "fsdp x2", kind)
