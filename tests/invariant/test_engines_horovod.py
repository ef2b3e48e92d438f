"""Horovod, under its own launcher, learns in every stage what one process learns."""

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, launched
from tests.invariant.engines import OTHERS, STAGES, Asked, meetings, same_as_alone, train_all, train_alone
from tests.invariant.rollouts import KINDS, rollout_runs, same_rollouts_as_alone, train_rollouts_alone

pytest.importorskip("horovod.torch", reason="Horovod is not built here", exc_type=ImportError)

HOROVOD = {
    "horovod": Asked([], (*STAGES, *OTHERS)),  # which the launcher decides
    "ddp under horovodrun": Asked(["--engine", "ddp"], ("pretrain",)),
}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("horovod")
    train_alone(folder)
    train_rollouts_alone(folder)
    train_all(folder, HOROVOD, ranks=2, also=rollout_runs(folder, "horovod x2", 2), horovod=True)
    return folder


@pytest.mark.parametrize(("engine", "stage"), meetings(HOROVOD))
def test_two_ranks_under_horovodrun(spread: Path, engine: str, stage: str) -> None:
    same_as_alone(spread, f"{engine} x2", stage)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_draw_the_answers_of_one(spread: Path, kind: str) -> None:
    same_rollouts_as_alone(spread, "horovod x2", kind)


def test_ranks_stay_equal_sum_once_an_update_and_skip_a_bad_one(tmp_path: Path) -> None:
    """Two ranks, three accumulated micro-batches."""
    said = launched(ROOT / "tests/e2e/ranks.py", tmp_path / "state", horovod=True).stdout
    found = json.loads(said[said.index("{") :].splitlines()[0])
    assert found["difference"] == 0 and found["generator's difference"] < 1e-5 and found["reductions"] == 1
    assert found["bad update left no trace"] and found["settings are its own"]
