"""Checkpoints: exact, checked by hash, and never at the cost of the one before."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dataset.loader import TextRows
from tests.conftest import encoded
from training import NextToken, PretrainConfig, checkpoint
from training.distributed import World
from training.engines import Machine, SingleEngine, torch_files

RUN = {"progress": {"step": 2}, "note": "kept as it is"}


@pytest.fixture
def make_engine(make_model):
    def make(seed: int = 0, **settings) -> SingleEngine:
        config = PretrainConfig(**{"optimizer": "adamw"} | settings)
        return SingleEngine(
            make_model(seed=seed, n_layers=1), config, Machine(World(), torch.device("cpu"), torch.float32)
        )

    return make


def train(engine: SingleEngine, updates: int = 2) -> None:
    rows = TextRows(encoded(ids=[[1, 21, 22, 23, 2], [1, 31, 32, 33, 2]]), 8, 3)
    for _ in range(updates):
        engine.forward_backward([rows.collate([0])], NextToken())
        engine.step(1e-2)


def write(engine: SingleEngine, folder, run, keep_last: int) -> str | None:
    saving = checkpoint.Saving(engine, folder, run, keep_last)
    while not saving.published():
        pass
    return saving.problem


def save(engine: SingleEngine, checkpoints, *steps: int, keep_last: int = 9) -> None:
    for step in steps:
        assert write(engine, checkpoints / f"step_{step:06d}", RUN, keep_last) is None


def names(checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_optimizer_and_random_state_come_back_exactly(make_engine, tmp_path, optimizer):
    engine = make_engine(optimizer=optimizer)
    train(engine)
    save(engine, tmp_path, 2)
    following = torch.rand(3)
    train(engine)
    other = make_engine(seed=1, optimizer=optimizer)
    train(other, updates=1)  # has a state of its own to lose
    assert checkpoint.load(other, tmp_path / "step_000002") == RUN
    assert torch.equal(torch.rand(3), following)
    train(other)
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("before", [World(), World(size=2, tp=2)])
def test_tensor_ranks_go_on_with_the_same_random_numbers(make_model, tmp_path, before):
    """They drop out of what both hold, whoever wrote; data ranks and stages keep numbers of their own."""

    def engine(world: World) -> SingleEngine:
        return SingleEngine(
            make_model(n_layers=1), PretrainConfig(), Machine(world, torch.device("cpu"), torch.float32)
        )

    save(engine(before), tmp_path, 1)
    following = torch.rand(3)
    for world, alike in ((World(1, 4, tp=2), True), (World(2, 4, tp=2), False), (World(1, 2), False)):
        torch.manual_seed(7)
        checkpoint.load(engine(world), tmp_path / "step_000001")
        assert torch.equal(torch.rand(3), following) == alike, world


def test_the_random_state_of_tensor_ranks_is_one_file(make_model, tmp_path):
    world = World(rank=1, size=2, tp=2)
    engine = SingleEngine(make_model(n_layers=1), PretrainConfig(), Machine(world, torch.device("cpu"), torch.float32))
    assert write(engine, tmp_path / "step_000001", RUN, keep_last=9) is None
    assert not list(tmp_path.rglob("rng_*"))  # which the first of them writes


def test_what_a_checkpoint_holds(make_engine, tmp_path):
    engine = make_engine()
    train(engine)
    save(engine, tmp_path, 2)
    folder = tmp_path / "step_000002"
    assert names(tmp_path) == ["step_000002"]  # nothing is left beside it
    assert names(folder) == ["COMPLETE", "rng_0.pt", "run.json", "state"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(json.loads((folder / "COMPLETE").read_text())) == files - {"COMPLETE"}
    assert checkpoint.damage(folder) is None


def files_of(make_engine, folder) -> list:
    save(make_engine(), folder.parent, int(folder.name[5:]))
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "COMPLETE")


def test_one_flipped_bit_in_any_file_is_found(make_engine, tmp_path):
    folder = tmp_path / "step_000001"
    for path in files_of(make_engine, folder):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert (
            checkpoint.damage(folder)
            == f"{path.relative_to(folder)} is damaged (its hash differs from the one written)"
        )
        path.write_bytes(content)
    assert checkpoint.damage(folder) is None


def test_a_missing_file_is_found(make_engine, tmp_path):
    folder = tmp_path / "step_000001"
    for path in files_of(make_engine, folder):
        path.rename(tmp_path / "aside")
        assert checkpoint.damage(folder) == f"{path.relative_to(folder)} is missing"
        (tmp_path / "aside").rename(path)


def test_a_checkpoint_without_its_mark_is_not_whole(make_engine, tmp_path):
    save(make_engine(), tmp_path, 1)
    mark = tmp_path / "step_000001" / "COMPLETE"
    for content in (b'{"run.json": ', None):
        mark.unlink() if content is None else mark.write_bytes(content)
        assert checkpoint.damage(tmp_path / "step_000001") == "it was not written to its end (no COMPLETE)"


def test_the_newest_whole_checkpoint_is_found_and_the_others_are_told(make_engine, tmp_path):
    save(make_engine(), tmp_path, 100, 200, 300, 400)
    (tmp_path / "step_000400" / "COMPLETE").unlink()
    (tmp_path / "step_000300" / "run.json").write_text("{}")
    told: list[str] = []
    assert checkpoint.find("auto", tmp_path, told.append) == tmp_path / "step_000200"
    assert [line[:34] for line in told] == ["checkpoint step_000400 is not used", "checkpoint step_000300 is not used"]
    assert "no COMPLETE" in told[0] and "run.json is damaged" in told[1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that answers with an I/O error")
@pytest.mark.parametrize("name", ["run.json", "COMPLETE"])
def test_a_file_that_cannot_be_read_is_not_taken_for_damage(make_engine, tmp_path, name):
    save(make_engine(), tmp_path, 1, 2)
    path = tmp_path / "step_000002" / name
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"step_000002 could not be read \(.*Input/output error.*run the same command"):
        checkpoint.find("auto", tmp_path, print)


def test_the_cause_of_a_failed_save_is_shown(make_engine, tmp_path):
    (tmp_path / "file").touch()
    problem = checkpoint.attempt(lambda: make_engine().save(tmp_path / "file" / "state", background=False))
    assert problem is not None and problem.startswith("NotADirectoryError: [Errno 20]")


def test_steps_are_numbers(make_engine, tmp_path):
    save(make_engine(), tmp_path, 999_999, 1_000_000, keep_last=1)
    assert names(tmp_path) == ["step_1000000"]
    (tmp_path / "step_1000000").rename(tmp_path / "step_1000000_of_monday")  # a user's own copy
    assert checkpoint.find("auto", tmp_path, print) is None


def test_nothing_to_resume_from(make_engine, tmp_path):
    assert checkpoint.find("auto", tmp_path / "none", print) is None
    save(make_engine(), tmp_path, 100)
    assert checkpoint.find("none", tmp_path, print) is None


def test_a_named_checkpoint_is_taken_or_refused_by_name(make_engine, tmp_path):
    save(make_engine(), tmp_path, 100, 200)
    named = str(tmp_path / "step_000100")
    assert checkpoint.find(named, tmp_path, print) == tmp_path / "step_000100"
    (tmp_path / "step_000100" / "run.json").unlink()
    with pytest.raises(ValueError, match="--resume .*step_000100: run.json is missing; use --resume auto"):
        checkpoint.find(named, tmp_path, print)
    with pytest.raises(FileNotFoundError, match="--resume .*step_000300: no such folder; give a checkpoint"):
        checkpoint.find(str(tmp_path / "step_000300"), tmp_path, print)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_with_code_in_it_is_not_read(tmp_path, file):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "code was run",)

        def __deepcopy__(self, known):  # else saving would run it
            return self

    # values that are no tensors, as a loss scaler has them
    dcp.save({"value": 1 if file == ".metadata" else Malicious()}, checkpoint_id=tmp_path / "state", no_dist=True)
    if file == ".metadata":
        (tmp_path / "state" / file).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="state.* read: .*"):
        torch_files.load({"value": 1}, tmp_path / "state", alone=True)
    assert not (tmp_path / "code was run").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_named_checkpoint_of_another_user_is_refused(make_engine, tmp_path, monkeypatch):
    save(make_engine(), tmp_path, 100)
    folder = tmp_path / "step_000100"
    os.chown(folder / "run.json", 4711, -1)
    assert checkpoint.find(str(folder), tmp_path, print) == folder  # root is not asked
    monkeypatch.setattr(os, "geteuid", lambda: 4712)
    with pytest.raises(ValueError, match=r"--resume .*step_000100 belongs to user 4711, .*`cp -r`"):
        checkpoint.find(str(folder), tmp_path, print)


def test_old_checkpoints_go(make_engine, tmp_path):
    engine = make_engine()
    save(engine, tmp_path, 100, 200, 300, keep_last=2)
    assert names(tmp_path) == ["step_000200", "step_000300"]
    save(engine, tmp_path, 400, keep_last=1)
    assert names(tmp_path) == ["step_000400"]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_what_was_just_written_is_what_auto_continues_from(make_engine, tmp_path, keep_last):
    """Also after going back to an earlier step, by name or because the newest were damaged."""
    engine = make_engine()
    save(engine, tmp_path, 100, 200, 300)
    (tmp_path / "step_000300" / "run.json").unlink()
    save(engine, tmp_path, 150, keep_last=keep_last)
    assert checkpoint.find("auto", tmp_path, print) == tmp_path / "step_000150"
    assert names(tmp_path) == ["step_000100", "step_000150"][-keep_last:]


def test_saving_a_step_again_replaces_it(make_engine, tmp_path):
    engine = make_engine()
    save(engine, tmp_path, 100)
    train(engine)
    save(engine, tmp_path, 100)
    other = make_engine(seed=1)
    checkpoint.load(other, tmp_path / "step_000100")
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), other.model.parameters(), strict=True))


def test_a_checkpoint_that_cannot_be_written_costs_no_other(make_engine, tmp_path):
    engine = make_engine()
    save(engine, tmp_path, 100)
    problem = write(engine, tmp_path / "step_000200", {"not JSON": object()}, keep_last=1)
    assert problem is not None and "not JSON serializable" in problem
    assert names(tmp_path) == ["step_000100"]
    assert checkpoint.find("auto", tmp_path, print) == tmp_path / "step_000100"


def test_a_folder_left_half_written_is_cleared_away(make_engine, tmp_path):
    (tmp_path / ".step_000100.part" / "state").mkdir(parents=True)
    (tmp_path / ".step_000100.part" / "rubbish").write_text("from a killed run")
    assert checkpoint.find("auto", tmp_path, print) is None
    save(make_engine(), tmp_path, 100)
    assert names(tmp_path) == ["step_000100"]
    assert not (tmp_path / "step_000100" / "rubbish").exists()


def test_what_is_saved_in_the_background_is_the_state_when_it_began(make_engine, tmp_path):
    engine, follower = make_engine(), make_engine(seed=1)
    train(engine)
    before = {name: tensor.clone() for name, tensor in engine.weights().items()}
    saving = checkpoint.Saving(engine, tmp_path / "step_000002", RUN, keep_last=9, background=True)
    train(engine)  # goes on while the files are written
    while not saving.published():
        pass
    assert saving.problem is None and checkpoint.damage(tmp_path / "step_000002") is None
    checkpoint.load(follower, tmp_path / "step_000002")
    assert all(torch.equal(before[name], tensor) for name, tensor in follower.weights().items())
    train(follower)
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), follower.model.parameters(), strict=True))
