"""From a config as asked to a run's parts: shapes filled in, data divided by data ranks, and errors in one line."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from dataset import load_tokenizer
from dataset.encode import SPREAD_FROM
from dataset.loader import EMPTY_ROW, ENDLESS
from model import load_pretrained, save_pretrained
from serving import Session
from tests.dataset.foreign import make_foreign_folder, make_llama2_folder
from tests.helpers import PLAIN, ROOT, TINY, command, environment, make_data, run_here, train_here, write_jsonl
from training import STAGES, DPOConfig, PretrainConfig, SFTConfig
from training.config import SHAPE_FLAGS, rules
from training.distributed import World
from training.engines import Machine
from training.setup import STOPPED, load_data, run_identity, run_stage, starting_model, weights_hash
from training.stages import LOSS_FLAGS

SMALL = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
# for every flag of the model's shape, another value than the folder's
OTHERS = {
    "dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": 6464, "rope_theta": 1e4,
    "norm_eps": 1e-5, "tie_embeddings": False, "qk_norm": True,
}  # fmt: skip


@pytest.fixture
def folder(make_model, tokenizer, tmp_path) -> str:
    """A model folder, as pretraining leaves it in tmp_path."""
    path = tmp_path / "pretrain_32"
    save_pretrained(make_model(n_layers=1, vocab_size=6400), path)
    tokenizer.save(path)
    return str(path)


# The starting model ---------------------------------------------------------------------------------------------


def test_a_fresh_model_has_the_shapes_of_the_flags_and_the_rest_filled_in():
    start = starting_model(PretrainConfig(**SMALL, dropout=0.25))
    shape, config = start.model.config, start.config
    assert {name: getattr(shape, name) for name in SMALL} == SMALL and shape.dropout == 0.25
    assert shape.vocab_size == start.tokenizer.vocab_size == 6400
    assert (config.init_from, config.max_seq_len, start.max_seq_len) == ("none", 64, 64)
    assert {name: getattr(config, name) for name in SHAPE_FLAGS} == {name: getattr(shape, name) for name in SHAPE_FLAGS}
    assert None not in [getattr(config, name) for name in SHAPE_FLAGS]


def test_a_width_alone_is_enough_and_what_is_given_beside_it_holds():
    found = starting_model(PretrainConfig(dim=128)).config
    assert (found.n_layers, found.n_heads, found.n_kv_heads, found.ffn_dim) == (4, 4, 1, 384)
    found = starting_model(PretrainConfig(dim=128, n_layers=2, n_heads=8)).config
    assert (found.n_layers, found.n_heads, found.n_kv_heads) == (2, 8, 2)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ("muon", 5e-3)),
        ({"learning_rate": 1e-4}, ("muon", 1e-4)),
        ({"optimizer": "adamw"}, ("adamw", 1.5e-3)),
        ({"engine": "deepspeed"}, ("adamw", 1.5e-3)),
    ],
)
def test_optimizer_and_rate_that_nobody_gave(asked, expected):
    config = starting_model(PretrainConfig(dim=256, **asked)).config
    assert (config.optimizer, config.learning_rate) == expected


@pytest.mark.parametrize("sizes", [{"dim": -4}, {"n_heads": -1}, {"dim": 0}, {"n_heads": 0}])
def test_a_size_below_one_is_named(sizes):
    (name, size) = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=f"{name} is {size}; it must be at least 1"):
        starting_model(PretrainConfig(**sizes))


def test_flags_that_were_given_stay_as_they_were():
    asked = PretrainConfig(**SMALL, learning_rate=3e-3, vocab_size=7000, tie_embeddings=False, qk_norm=True)
    config = starting_model(asked).config
    given = {name: value for name, value in asdict(asked).items() if value is not None}
    assert given.items() <= asdict(config).items()


def test_a_fresh_model_takes_no_memory_and_its_weights_are_those_of_the_seed():
    start = starting_model(PretrainConfig(**SMALL, seed=5))
    parameters = dict(start.model.named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    weights = dict(start.weights())
    assert {name: p.shape for name, p in parameters.items()} == {name: w.shape for name, w in weights.items()}
    again, other = starting_model(PretrainConfig(**SMALL, seed=5)), starting_model(PretrainConfig(**SMALL, seed=6))
    assert weights_hash(start.weights) == weights_hash(start.weights) == weights_hash(again.weights)
    assert weights_hash(start.weights) != weights_hash(other.weights)


def test_a_folder_decides_the_shapes_and_gives_its_weights(folder, make_model):
    start = starting_model(SFTConfig(init_from=folder, dropout=0.25))
    shape, config = start.model.config, start.config
    assert (shape.dim, shape.n_layers, shape.ffn_dim, shape.dropout) == (32, 1, 48, 0.25)
    assert {name: getattr(config, name) for name in SHAPE_FLAGS} == {name: getattr(shape, name) for name in SHAPE_FLAGS}
    assert (config.init_from, config.max_seq_len, start.max_seq_len) == (folder, 64, 64)
    expected, found = make_model(n_layers=1, vocab_size=6400).state_dict(), dict(start.weights())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", SHAPE_FLAGS)
def test_a_shape_that_contradicts_the_folder_is_refused_by_name(folder, name):
    found = getattr(starting_model(SFTConfig(init_from=folder)).config, name)
    starting_model(SFTConfig(init_from=folder, **{name: found}))  # the same again is no contradiction
    with pytest.raises(ValueError, match=f"--{name} {OTHERS[name]} contradicts .*, which has {name} {found}; leave"):
        starting_model(SFTConfig(init_from=folder, **{name: OTHERS[name]}))


@pytest.mark.parametrize(("asked", "row", "context"), [(None, 64, 64), (16, 16, 64), (256, 256, 256)])
def test_a_longer_context_than_the_folders_is_allowed_and_shorter_rows_leave_it(folder, asked, row, context):
    start = starting_model(SFTConfig(init_from=folder, max_seq_len=asked))
    assert (start.max_seq_len, start.config.max_seq_len, start.model.config.max_seq_len) == (row, row, context)


def test_rows_as_long_as_the_folders_context_are_said_where_nobody_asked_for_them(folder, load, capsys):
    load(here(), cls=SFTConfig, init_from=folder, max_seq_len=None)
    assert capsys.readouterr().out.startswith(f"rows of 64 tokens, from {folder}; --max_seq_len N changes it\n")
    load(here(), cls=SFTConfig, init_from=folder)  # asked for
    load(here(rank=1, size=2), cls=SFTConfig, init_from=folder, max_seq_len=None)  # said by another
    assert "rows of" not in capsys.readouterr().out


def test_a_model_made_elsewhere_is_not_trained_on_rows_of_its_whole_context_unasked(make_model, tmp_path):
    tokenizer = load_tokenizer(make_foreign_folder(tmp_path))
    save_pretrained(make_model(n_layers=1, vocab_size=tokenizer.vocab_size, max_seq_len=40_960), tmp_path)
    for asked, row in ((None, 2048), (4096, 4096), (64, 64)):
        start = starting_model(SFTConfig(init_from=str(tmp_path), max_seq_len=asked))
        assert (start.max_seq_len, start.model.config.max_seq_len) == (row, 40_960)
        said = f"rows of 2,048 tokens, from {tmp_path} (of its context of 40,960); --max_seq_len N changes it"
        assert start.note == ("" if asked else said)


@pytest.mark.parametrize(
    ("config", "script"),
    [(SFTConfig(dim=48), "train_pretrain.py"), (DPOConfig(dim=48), "train_full_sft.py"), (SFTConfig(), "_512 is not")],
)
def test_a_stage_without_the_one_before_says_what_to_run(tmp_path, config, script):
    config.out_dir = str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=f"{script}.*--init_from FOLDER"):
        starting_model(config)


def test_a_stage_starts_from_the_folder_of_the_one_before(folder, tmp_path):
    assert starting_model(SFTConfig(dim=32, out_dir=str(tmp_path))).config.init_from == folder


def test_a_stage_starts_from_a_run_by_its_name(folder, tmp_path, monkeypatch):
    asked = SFTConfig(init_from="wide", out_dir=str(tmp_path / "out"))
    with pytest.raises(
        FileNotFoundError, match=f"wide: no such folder, here or in {tmp_path}/out; .*the name of a run"
    ):
        starting_model(asked)
    shutil.copytree(folder, tmp_path / "out/wide")
    assert starting_model(asked).config.init_from == f"{tmp_path}/out/wide"
    shutil.copytree(folder, tmp_path / "out/wide/best")
    assert starting_model(replace(asked, init_from="wide/best")).config.init_from == f"{tmp_path}/out/wide/best"
    shutil.copytree(folder, tmp_path / "wide")  # a folder itself is what is meant
    monkeypatch.chdir(tmp_path)
    assert starting_model(asked).config.init_from == "wide"


def test_a_stage_that_is_asked_to_starts_from_random_weights():
    assert starting_model(SFTConfig(**SMALL, init_from="none")).config.init_from == "none"


@pytest.fixture
def foreign_base(make_model, tmp_path):
    """A Llama base model: its tokenizer has no chat template, its vocabulary more rows than that has tokens."""
    base = make_llama2_folder(tmp_path / "base", template=None)
    save_pretrained(make_model(vocab_size=2000), base)
    return base


def test_a_model_that_cannot_chat_is_refused_with_the_flag_that_helps(foreign_base):
    with pytest.raises(ValueError, match=r"base: this tokenizer has no chat template.*--chat_template chatml"):
        starting_model(SFTConfig(init_from=str(foreign_base)))


def test_a_model_without_a_template_is_tuned_with_chatml_sampled_and_asked(foreign_base, tmp_path, capsys):
    data = make_data(tmp_path, rows=8)
    flags = ["--out_dir", tmp_path, "--cache_dir", tmp_path / "cache", "--max_steps", 2, "--max_seq_len", 64, *PLAIN]
    tune = ["--data_path", data["full_sft"], "--init_from", foreign_base, "--chat_template", "chatml"]
    train_here("full_sft", *flags, *tune, "--sample_interval", 1, "--sample_prompt", "Hi")
    run = tmp_path / "full_sft_32"
    assert (run / "chat_template.jinja").is_file()
    session = Session(load_pretrained(run), load_tokenizer(run), {"max_new_tokens": 8, "temperature": 2.0}, seed=0)
    list(session.answer("Hi"))
    assert session.prompt("Hi")[0][0] == 1 and session.messages[1]["role"] == "assistant"
    train_here("dpo", *flags, "--data_path", data["dpo"], "--init_from", run)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_model, tokenizer, tmp_path):
    message = "the tokenizer has 6400 tokens but the model's vocabulary only 97; give a larger --vocab_size"
    with pytest.raises(ValueError, match=message):
        starting_model(PretrainConfig(**SMALL, vocab_size=97))
    save_pretrained(make_model(n_layers=1), tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        starting_model(SFTConfig(init_from=str(tmp_path)))
    assert starting_model(PretrainConfig(**SMALL, vocab_size=6464)).model.config.vocab_size == 6464


# Data -----------------------------------------------------------------------------------------------------------


def here(**place: int) -> Machine:
    return Machine(World(**place), torch.device("cpu"), torch.float32)


@pytest.fixture
def load(tmp_path):
    """load(machine, **flags) -> Data of 60 short texts, a fifth of them held out."""
    data = make_data(tmp_path)

    def load(machine: Machine, cls=PretrainConfig, **flags):
        given = {"data_path": [str(data[cls.stage])], "val_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return load_data(starting_model(cls(**(SMALL | given | flags))), machine)

    return load


def test_loaders_go_by_the_place_among_those_that_divide_the_data(load):
    data = load(here(rank=3, size=4, tp=2), batch_size=2, accumulation_steps=3)
    assert [(part.rank, part.world_size, part.batch_size) for part in (data.train, data.val)] == [(1, 2, 2)] * 2
    assert (data.train.rows_per_update, data.val.rows_per_update) == (2 * 2 * 3, 2 * 2)
    neighbour = load(here(rank=2, size=4, tp=2), batch_size=2, accumulation_steps=3)
    assert [b.row_ids for b in neighbour.train.update(0)] == [b.row_ids for b in data.train.update(0)]


def test_a_global_batch_is_kept_whatever_the_number_of_ranks(load):
    for size in (1, 2, 3):
        data = load(here(size=size, local_size=size), batch_size=2, global_batch_size=12)
        assert (data.train.rows_per_update, data.train.accumulation_steps) == (12, 6 // size)


@pytest.mark.parametrize(("eval_rows", "looked_at"), [(2, 2), (0, None), (10_000, None)])
def test_a_validation_looks_at_eval_rows_at_most(load, eval_rows, looked_at):
    val = load(here(), eval_rows=eval_rows).val
    assert len(val.rows) > 2 and val.total_rows == (looked_at or len(val.rows))


def test_epochs_count_rows_and_steps_do_not_end_by_rows(load):
    train = load(here(), epochs=2.5).train
    assert train.total_rows == round(2.5 * len(train.rows)) and train.rows_per_epoch == len(train.rows)
    assert load(here(), epochs=2.5, max_steps=3).train.total_rows == ENDLESS


def test_an_epoch_cut_to_less_than_a_row_is_one_row_and_not_all(load):
    assert load(here(), epochs=1e-3).train.total_rows == 1


def test_a_micro_batch_is_no_larger_than_an_update_can_fill_and_that_is_said(load, capsys, tmp_path):
    three = write_jsonl(tmp_path / "three.jsonl", [{"text": "one " * 40}, {"text": "two " * 40}, {"text": "six " * 40}])
    data = load(here(), data_path=[str(three)], val_fraction=0, batch_size=4096)
    rows = len(data.train.rows)
    (batch,) = data.train.update(0)
    assert batch.input_ids.shape == (rows, 64) and EMPTY_ROW not in batch.row_ids and rows < 9
    said = f"--batch_size 4,096 is taken as {rows}: an update holds {rows} rows over all processes\n"
    assert capsys.readouterr().out.endswith(said)
    ranks = [load(here(rank=rank, size=2), data_path=[str(three)], batch_size=4096) for rank in (0, 1)]
    assert [data.train.batch_size for data in ranks] == [-(-len(ranks[0].train.rows) // 2)] * 2
    capsys.readouterr()
    load(here(), batch_size=2)
    assert "is taken as" not in capsys.readouterr().out


def test_a_micro_batch_is_no_larger_than_the_global_batch(load):
    train = load(here(size=3), batch_size=16, global_batch_size=8, max_steps=5).train
    assert (train.batch_size, train.accumulation_steps, train.rows_per_update) == (3, 1, 8)


def test_that_no_row_is_held_out_is_said(load, capsys):
    assert load(here(), val_fraction=1e-9).val is None
    said = "no validation: --val_fraction 1e-09 gives no row; a larger --val_fraction or other --val_path files do\n"
    assert said in capsys.readouterr().out
    load(here(), val_fraction=0)
    assert "no validation" not in capsys.readouterr().out


def test_to_skip_bad_rows_at_a_resume_is_no_other_data_where_no_row_was_bad(load):
    start, skipping = (starting_model(PretrainConfig(**SMALL, on_bad_row=how)) for how in ("stop", "skip"))
    data = [load(here(), on_bad_row=how) for how in ("stop", "skip")]
    assert run_identity(start, data[0]) == run_identity(skipping, data[1])


def test_without_a_held_out_part_all_rows_are_learnt(load, tmp_path):
    part, whole = load(here()), load(here(), val_fraction=0.0)
    assert whole.val is None and whole.parts == [whole.train] and len(part.parts) == 2
    used = [loader.rows.encoded.report.used for loader in (whole.train, part.train, part.val)]
    assert used[0] == 60 == used[1] + used[2] and used[2] > 0
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "one"}, {"text": "two"}])
    both = load(here(), val_path=[str(other)])
    assert [loader.rows.encoded.report.used for loader in both.parts] == [60, 2]


def test_the_table_is_printed_once(load, capsys):
    load(here(rank=1, size=2))
    assert capsys.readouterr().out == ""
    load(here())
    assert "packed rows" in capsys.readouterr().out


def test_data_without_a_row_to_learn_from_is_an_error(load, tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="empty.jsonl: no row is left to learn from"):
        load(here(), data_path=[str(empty)])


# What a checkpoint must share with a run ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_identity_is_data_start_and_exactly_the_flags_whose_rule_refuses(stage, folder, tmp_path):
    cls = STAGES[stage].config
    data, cache = [str(make_data(tmp_path)[stage])], str(tmp_path / "cache")
    init = "none" if stage == "pretrain" else folder
    start = starting_model(cls(**SMALL, init_from=init, data_path=data, cache_dir=cache, val_fraction=0.0, seed=7))
    loaded = load_data(start, here())
    identity = run_identity(start, loaded)
    assert identity.pop("stage") == stage
    assert identity.pop("data") == loaded.train.rows.fingerprint
    assert identity.pop("init_from") == ("none" if init == "none" else weights_hash(start.weights))
    flags = identity
    refused = {name for name, rule in rules(cls).items() if rule.resume == "refuse"}
    assert flags == {name: getattr(start.config, name) for name in refused}
    assert {"seed", "dim", "max_seq_len"} <= flags.keys()
    open_ones = {name for name, value in flags.items() if value is None}
    adapters = {name for name in refused if rules(cls)[name].group == "adapter"}  # there is none
    others = {*LOSS_FLAGS} - {"beta"} if stage == "dpo" else set()  # of other losses than the run's
    assert open_ones == adapters | others
    assert ({"beta", "loss_type"} <= flags.keys()) == (stage == "dpo")


def test_the_identity_goes_by_weights_and_not_by_where_they_lie(folder, make_model, tokenizer, tmp_path):
    data = {"data_path": [str(make_data(tmp_path)["full_sft"])], "cache_dir": str(tmp_path / "cache")}

    def identity(path: str) -> dict:
        start = starting_model(SFTConfig(init_from=path, **data))
        return run_identity(start, load_data(start, here()))

    for name, seed in (("copy", 0), ("other", 1)):
        save_pretrained(make_model(seed=seed, n_layers=1, vocab_size=6400), tmp_path / name)
        tokenizer.save(tmp_path / name)
    assert identity(folder) == identity(str(tmp_path / "copy"))
    other = identity(str(tmp_path / "other"))
    assert {name for name, value in identity(folder).items() if other[name] != value} == {"init_from"}


# Errors in one line ---------------------------------------------------------------------------------------------


def stop(error: BaseException):
    def main(config) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error", [ValueError("--dim is odd; give another"), FileNotFoundError("x.jsonl: no such file")]
)
def test_what_a_user_did_wrong_is_one_line_and_status_2(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py"])
    with pytest.raises(SystemExit) as end:
        run_stage(stop(error), PretrainConfig)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_a_flag_that_is_wrong_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", "--batch_size", "0"])
    with pytest.raises(SystemExit) as end:
        run_stage(stop(AssertionError("main is not reached")), PretrainConfig)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --batch_size is 0; it must be at least 1\n"


SYSTEM = [
    (PermissionError(errno.EACCES, "Permission denied", "out/x"),
     "out/x: Permission denied; change its permissions, or give another path"),
    (OSError(errno.ENOSPC, "No space left on device"),
     "No space left on device; free some space, then run the same command again"),
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "text"), SYSTEM, ids=[text for _, text in SYSTEM])
def test_what_the_system_does_not_allow_is_one_line_and_status_2(monkeypatch, capsys, error, text):
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py"])
    with pytest.raises(SystemExit) as end:
        run_stage(stop(error), PretrainConfig)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {text}\n")


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    data = make_data(tmp_path)["pretrain"]
    done = run_here("pretrain", "--data_path", data, "--cache_dir", tmp_path / "file" / "x", "--out_dir", tmp_path,
                    *TINY, "--dim", 32)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/file") and "Traceback" not in done.stderr


def heed_ctrl_c() -> None:
    """What a shell starts in the background is started deaf to it, the tests and all that they start included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_data_is_prepared_is_one_line_and_status_130_and_leaves_nothing(tmp_path):
    """In processes: one that prepares, in a group of its own as a terminal makes it, with workers."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{i} " + "one two three " * 500} for i in range(7000)])
    assert path.stat().st_size > SPREAD_FROM
    flags = ["--data_path", path, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path, "--dim", 32, *TINY]
    process = subprocess.Popen(command("pretrain", *flags), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=heed_ctrl_c)  # fmt: skip
    while not list(tmp_path.glob("cache/*.part/*.arrow")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)  # workers are starting
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, f"{STOPPED}\n")
    assert [each.suffix for each in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [KeyError("name"), RuntimeError("shapes do not match")], ids=repr)
def test_an_error_of_ours_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py"])
    with pytest.raises(type(error)) as found:
        run_stage(stop(error), PretrainConfig)
    assert found.value is error


def test_main_gets_the_config_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--beta", "0.5"])
    found: list[DPOConfig] = []
    run_stage(found.append, DPOConfig)
    assert [(type(config), config.beta) for config in found] == [(DPOConfig, 0.5)]
