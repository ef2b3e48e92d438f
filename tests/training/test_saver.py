"""How a run begins and is saved on its way: what is refused, what is noted, and a disk that does not take it."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from model import load_pretrained
from tests.helpers import write_jsonl
from training import PretrainConfig, checkpoint
from training.config import rules
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.saver import Progress, Saver, data_files, noted, origin, resume

IDENTITY = {"seed": 42, "data": "a hash", "shape": {"dim": 32, "n_layers": 1}}
SETTINGS = {"epochs": 1.0, "learning_rate": 1e-3, "processes": 1}
PROGRESS = Progress(step=4, position=64, tokens=999, seconds=1.5)


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    return PretrainConfig(out_dir=str(tmp_path), dim=32, save_interval=50)


@pytest.fixture
def make_engine(make_model, config):
    def make(seed: int = 0) -> SingleEngine:
        machine = Machine(World(), torch.device("cpu"), torch.float32)
        return SingleEngine(make_model(seed=seed, n_layers=1), config, machine)

    return make


@pytest.fixture
def make_saver(make_engine, config, tokenizer):
    """make_saver(told, **settings) -> Saver of a fresh run of 10 steps; told gets what it says."""

    def make(told: list[str] | None = None, engine=None, progress=None, **flags) -> Saver:
        say = ([] if told is None else told).append
        changed, engine = replace(config, **flags), engine or make_engine()
        return Saver(engine, changed, tokenizer, IDENTITY, SETTINGS, progress or Progress(), 10, say)

    return make


@pytest.fixture
def go_on(make_engine, config):
    """go_on(identity, settings) -> (Progress, what was said, the engine), resumed by an engine of other weights."""

    def resumed(identity=IDENTITY, settings=SETTINGS, **flags) -> tuple[Progress, list[str], SingleEngine]:
        told: list[str] = []
        engine = make_engine(seed=1)
        return resume(engine, replace(config, **flags), identity, settings, told.append), told, engine

    return resumed


def same_weights(a: SingleEngine, b: SingleEngine) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True))


def checkpoints(config: PretrainConfig) -> list[str]:
    return [path.name for path in checkpoint.by_step(config.run_dir / "checkpoints")]


# Resuming -------------------------------------------------------------------------------------------------------


def test_a_fresh_run_begins_at_nothing_and_says_nothing(go_on):
    progress, told, _ = go_on()
    assert progress == Progress() == Progress(0, 0, 0, 0.0) and told == []


def test_a_saved_run_goes_on_where_it_stood(make_saver, make_engine, go_on):
    make_saver().save(PROGRESS)
    progress, told, engine = go_on()
    assert progress == PROGRESS and same_weights(engine, make_engine())
    assert len(told) == 1 and told[0].startswith("resumed from ") and told[0].endswith("step_000004")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 7, "--seed was 42 and is 7"),
        ("data", "another hash", "the training data has changed, or the tokenizer that makes tokens of it"),
        ("shape", {"dim": 32, "n_layers": 2}, "--n_layers was 1 and is 2"),
    ],
)
def test_a_run_of_another_identity_is_refused_by_what_differs_alone_and_nothing_is_loaded(
    make_saver, make_engine, config, name, value, said
):
    make_saver().save(PROGRESS)
    engine, told = make_engine(seed=1), []
    with pytest.raises(ValueError) as error:
        resume(engine, config, IDENTITY | {name: value}, SETTINGS, told.append)
    assert str(error.value) == (
        f"{config.run_dir}/checkpoints/step_000004 cannot be continued exactly: {said}. "
        "Put back what it was made with, give another --out_dir, or start over with --resume none"
    )
    assert same_weights(engine, make_engine(seed=1)) and told == []


def test_a_name_that_an_older_checkpoint_does_not_know_is_let_pass(make_saver, go_on):
    make_saver().save(PROGRESS)
    progress, told, _ = go_on(IDENTITY | {"loss_type": "sigmoid"}, SETTINGS | {"beta1": 0.9})
    assert progress == PROGRESS and len(told) == 1


def test_what_changed_and_may_change_is_said_and_nothing_else(make_saver, go_on):
    make_saver().save(PROGRESS)
    progress, told, _ = go_on(settings=SETTINGS | {"epochs": 3.0, "processes": 2, "beta1": 0.5})
    assert progress == PROGRESS
    assert told[:-1] == [
        "note: epochs was 1.0 when this checkpoint was saved and is 3.0 now",
        "note: processes was 1 when this checkpoint was saved and is 2 now",
    ]


def test_a_data_file_that_changed_is_named(make_saver, go_on, config, tmp_path):
    kept, changed, new = (write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in ("a", "b", "c"))
    make_saver(data_path=[str(kept), str(changed)]).save(PROGRESS)
    changed.write_text("more than it was")
    with pytest.raises(ValueError) as error:
        go_on(IDENTITY | {"data": "another hash"}, data_path=[str(tmp_path / "*.jsonl")], val_fraction=0.5)
    causes = f"{new} was not among the training files; {changed} has changed; --val_fraction was 0.01 and is 0.5. "
    assert f"cannot be continued exactly: {causes}" in str(error.value)


def test_a_starting_model_that_changed_is_named(make_saver, go_on):
    identity = IDENTITY | {"init_from": "a hash"}
    saver = make_saver(init_from="out/pretrain_32")
    saver.kept["identity"] = identity
    saver.save(PROGRESS)
    for folder, said in (("out/pretrain_32", "the model in out/pretrain_32 has changed"),
                         ("other", "--init_from was out/pretrain_32 and is other")):  # fmt: skip
        with pytest.raises(ValueError, match=f"exactly: {said}\\. Put back"):
            go_on(identity | {"init_from": "another"}, init_from=folder)


def test_starting_over_moves_what_was_there_to_a_numbered_folder_and_says_where(make_saver, go_on, config):
    for number in (1, 2):
        make_saver().save(PROGRESS)
        (config.run_dir / "metrics.jsonl").write_text(f"of run {number}")
        progress, told, _ = go_on(IDENTITY | {"seed": 7}, resume="none")
        backup = config.run_dir.with_name(f"pretrain_32.{number}")
        assert progress == Progress() and list(config.run_dir.iterdir()) == []
        assert told == [f"starting over: what was in {config.run_dir} is now in {backup}"]
        assert checkpoint.damage(backup / "checkpoints/step_000004") is None
        assert (backup / "model.safetensors").is_file()
        assert (backup / "metrics.jsonl").read_text() == f"of run {number}"
    assert go_on(resume="none")[1] == []  # nothing was there


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_of_a_run_that_was_started_over_goes_on(make_saver, go_on, monkeypatch, name):
    make_saver().save(PROGRESS)
    monkeypatch.setenv(name, "1")
    progress, told, _ = go_on(resume="none")
    assert progress == PROGRESS and told[0].startswith("restarted: --resume none was for the first start")
    monkeypatch.setenv(name, "0")
    assert go_on(resume="none")[0] == Progress()


def test_checkpoints_of_which_none_is_whole_stop_the_run_and_stay(make_saver, go_on, config):
    saver = make_saver()
    for step in (2, 4):
        saver.save(replace(PROGRESS, step=step), last=False)
    folder = config.run_dir / "checkpoints"
    for step in (2, 4):
        (folder / f"step_{step:06d}" / "run.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        go_on()
    assert str(error.value) == (
        f"{folder}: none of the 2 checkpoints is whole; the newest, step_000004 is not used: run.json is damaged (its "
        "hash differs from the one written). Nothing was changed: repair it or put back a copy, or start over with "
        "--resume none, which moves them to a backup"
    )
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_that_was_being_written_at_a_kill_is_cleared_away(make_saver, go_on, config):
    make_saver().save(PROGRESS)
    half = config.run_dir / "checkpoints" / ".step_000008.part"
    half.mkdir()
    assert go_on()[0] == PROGRESS and not half.exists()


def test_what_is_noted_are_the_flags_whose_rule_says_so_and_how_the_run_is_spread(make_engine, config):
    found = noted(config, make_engine(), rows_per_update=24)
    flags = {name for name, rule in rules(config).items() if rule.resume == "note"}
    assert found.keys() == flags | {"engine", "processes", "rows an update"}
    assert all(found[f.name] == getattr(config, f.name) for f in fields(config) if f.name in flags)
    assert (found["engine"], found["processes"], found["rows an update"]) == ("single", 1, 24)


# Saving ---------------------------------------------------------------------------------------------------------


def test_a_save_leaves_a_checkpoint_and_a_model_folder(make_saver, make_engine, tokenizer, config):
    make_saver().save(PROGRESS)
    folder = config.run_dir / "checkpoints/step_000004"
    assert checkpoint.damage(folder) is None
    assert checkpoint.read_run(folder) == {
        "progress": asdict(PROGRESS),
        "identity": IDENTITY,
        "config": SETTINGS,
        "origin": origin(config),
        "files": data_files(config),
    }
    read, weights = load_pretrained(config.run_dir).state_dict(), make_engine().weights()
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)
    assert (config.run_dir / "tokenizer.json").is_file()


def test_a_step_is_saved_once(make_saver, config):
    saver = make_saver()
    saver.save(PROGRESS, last=False)
    written = (config.run_dir / "checkpoints/step_000004/COMPLETE").stat()
    saver.save(PROGRESS)
    resumed = make_saver(progress=PROGRESS)  # a run that goes on from this checkpoint and has learnt nothing yet
    resumed.save(PROGRESS)
    after = (config.run_dir / "checkpoints/step_000004/COMPLETE").stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    resumed.save(replace(PROGRESS, step=5))
    assert checkpoints(config) == ["step_000004", "step_000005"]


@pytest.mark.parametrize("gone", ["model.safetensors", "checkpoints"])
def test_a_complete_run_whose_model_or_checkpoint_is_gone_writes_it_again(make_saver, config, tmp_path, gone):
    make_saver().save(PROGRESS)
    (config.run_dir / gone).rename(tmp_path / "elsewhere")
    make_saver(progress=PROGRESS).save(PROGRESS)
    assert checkpoint.damage(config.run_dir / "checkpoints/step_000004") is None
    assert (config.run_dir / "model.safetensors").is_file()


def test_keep_last_checkpoints_stay(make_saver, config):
    saver = make_saver(keep_last=2)
    for step in (2, 4, 6):
        saver.save(replace(PROGRESS, step=step), last=False)
    assert checkpoints(config) == ["step_000004", "step_000006"]


def test_a_save_that_fails_on_the_way_is_a_warning_and_is_tried_again(make_saver, config):
    told: list[str] = []
    saver = make_saver(told)
    saver.save(replace(PROGRESS, step=2), last=False)
    in_the_way = config.run_dir / "checkpoints" / ".step_000004.part"
    in_the_way.write_text("a file where a folder has to be")
    saver.save(PROGRESS, last=False)
    assert len(told) == 1 and told[0].startswith("warning: step 4 could not be saved in ")
    assert "earlier checkpoints are untouched" in told[0] and "saves again in 50 steps" in told[0]
    assert checkpoints(config) == ["step_000002"]
    in_the_way.unlink(missing_ok=True)
    saver.save(PROGRESS, last=False)
    assert checkpoints(config) == ["step_000002", "step_000004"] and len(told) == 1


def test_a_save_that_fails_at_the_end_is_an_error(make_saver, config):
    told: list[str] = []
    saver = make_saver(told)
    saver.save(replace(PROGRESS, step=2), last=False)
    (config.run_dir / "checkpoints" / ".step_000010.part").write_text("a file where a folder has to be")
    with pytest.raises(ValueError, match="step 10 could not be saved in .*; .* run the same command again"):
        saver.save(replace(PROGRESS, step=10))
    assert checkpoints(config) == ["step_000002"] and told == []


def test_a_save_in_the_background_is_of_the_weights_when_it_began(make_saver, make_engine, go_on, config):
    engine = make_engine()
    saver = make_saver(engine=engine, async_save=True)
    saver.save(PROGRESS, last=False)
    assert saver.saving is not None  # and training goes on
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    saver.finish()
    assert not saver.written() and checkpoints(config) == ["step_000004"]
    read, weights = load_pretrained(config.run_dir).state_dict(), make_engine().weights()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert same_weights(go_on()[2], make_engine())


def test_the_last_save_waits_for_the_one_under_way_and_for_itself(make_saver, config):
    saver = make_saver(async_save=True)
    saver.save(PROGRESS, last=False)
    saver.save(replace(PROGRESS, step=5), last=True)
    assert saver.saving is None and checkpoints(config) == ["step_000004", "step_000005"]
