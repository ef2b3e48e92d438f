"""Flags and YAML: what is given is what is used, and what is not known is named with its nearest neighbour."""

from dataclasses import asdict

import pytest

from tests.helpers import ROOT
from training import DPOConfig, PretrainConfig, SFTConfig, load_config
from training.config import save_config


def load(*argv: str, cls=PretrainConfig):
    return load_config(cls, list(argv))


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> ["--config", file with this text]."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--lerning_rate", "1e-3"], "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (["--learning-rate=1e-3"], "unknown flag --learning-rate=1e-3; did you mean --learning_rate?"),
        (["--batchsize", "4"], "did you mean --batch_size?"),
        (["--learn", "1e-3"], "unknown flag --learn"),  # no abbreviations either
        (["--zzzzz"], "unknown flag --zzzzz; --help lists them all"),
        (["stray"], "unknown flag stray"),
        (["--beta", "0.1"], "unknown flag --beta"),  # DPO's alone
    ],
)
def test_an_unknown_flag_names_the_nearest(argv, nearest):
    with pytest.raises(ValueError) as error:
        load(*argv)
    assert nearest in str(error.value)


def test_an_unknown_key_names_file_and_nearest(recipe):
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown key n_layer; did you mean n_layers\?"):
        load(*recipe("n_layer: 4\n"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "flaot16", "'flaot16'; it must be one of auto, float32, bfloat16, float16; did you mean float16"),
        ("engine", "horovod", "must be one of"),
        ("on_bad_row", "ignore", "must be one of stop, skip"),
        ("n_layers", "4.5", "'?4.5'?; it must be a whole number"),
        ("n_layers", "many", "'many'; it must be a whole number"),
        ("learning_rate", "fast", "'fast'; it must be a number"),
        ("use_wandb", "maybe", "'maybe'; it must be true or false"),
        ("batch_size", "0", "--batch_size is 0; it must be at least 1"),
        ("max_seq_len", "-4", "--max_seq_len is -4; it must be at least 1"),
        ("warmup_steps", "-1", "--warmup_steps is -1; it must be at least 0"),
        ("val_fraction", "1.0", "val_fraction is 1.0; it must be in"),
        ("dropout", "-0.1", "dropout is -0.1"),
        ("learning_rate", "0", "learning_rate 0.0 .*more than 0"),
        ("learning_rate", ".nan", "learning_rate"),
        ("epochs", "-1", "epochs -1.0 .*more than 0"),
    ],
)
def test_a_bad_value_is_named_on_the_command_line_and_in_a_file(recipe, name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        load(f"--{name}", value.removeprefix("."))
    assert name in str(error.value)
    with pytest.raises(ValueError, match=message) as error:
        load(*recipe(f"{name}: {value}\n"))
    assert name in str(error.value)


def test_beta_must_be_positive():
    with pytest.raises(ValueError, match="--beta is 0.0; it must be more than 0"):
        load("--beta", "0", cls=DPOConfig)


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_overrides_the_file_which_overrides_the_default(recipe, order):
    file, flags = recipe("dim: 64\nn_layers: 4\n"), ["--n_layers", "6"]
    config = load(*[part for pair in (file, flags)[::order] for part in pair])
    assert (config.dim, config.n_layers, config.n_heads) == (64, 6, None)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--use_wandb"], True),
        (["--use_wandb", "true"], True),
        (["--use_wandb", "False"], False),
        (["--use_wandb=1"], True),
        (["--use_wandb", "--dim", "64"], True),
    ],
)
def test_switches(argv, value):
    assert load(*argv).use_wandb is value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("no", False), ("yes", True), ("False", False), ("0", False)]
)
def test_switches_in_a_file(recipe, text, value):
    assert load(*recipe(f"qk_norm: {text}\n")).qk_norm is value


def test_none_means_not_given_except_for_names(recipe):
    config = load(
        "--dim", "none", "--min_lr", "none", "--tie_embeddings", "none", "--init_from", "none", "--resume", "none"
    )
    assert config.dim is config.min_lr is config.tie_embeddings is None
    assert config.init_from == config.resume == "none"  # random weights; start over
    config = load(*recipe("dim: none\nmin_lr:\ninit_from: none\nresume: none\nval_path:\n"))
    assert config.dim is config.min_lr is None and config.val_path == []
    assert config.init_from == config.resume == "none"


@pytest.mark.parametrize("argv", [["--local_rank=1"], ["--local-rank", "0"], ["--local_rank", "3", "--dim", "64"]])
def test_the_flag_that_launchers_add_is_accepted(argv):
    assert "local_rank" not in asdict(load(*argv))


def test_numbers_as_people_write_them(recipe):
    config = load(*recipe("learning_rate: 1e-3\nseed: 7\nepochs: 2\nmax_steps: 1e3\ndata_path: a.jsonl\n"))
    assert (config.learning_rate, config.seed, config.epochs, config.max_steps) == (1e-3, 7, 2.0, 1000)
    assert type(config.max_steps) is int and type(config.epochs) is float
    assert config.data_path == ["a.jsonl"]
    assert load("--data_path", "a.jsonl", "b*.jsonl", "--dim", "64").data_path == ["a.jsonl", "b*.jsonl"]
    assert load("--seed", "18446744073709551615").seed == 2**64 - 1  # not by way of a float


@pytest.mark.parametrize("cls", [PretrainConfig, SFTConfig, DPOConfig])
def test_a_saved_config_loads_as_itself(tmp_path, cls):
    flags = ["--dim", "768", "--learning_rate", "3e-5", "--init_from", "none", "--tie_embeddings", "false",
             "--sample_prompt", "你好: #1", "--wandb_run_name", "007", "--data_path", "a b.jsonl", "c.jsonl"]  # fmt: skip
    for argv in ([], flags):
        config = load(*argv, cls=cls)
        save_config(config, tmp_path / "config.yaml")
        assert load("--config", str(tmp_path / "config.yaml"), cls=cls) == config
    assert f"train_{cls.stage}.py --config" in (tmp_path / "config.yaml").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "recipe.yaml: not YAML"), ("- dim\n", "found list, expected lines of `flag: value`")]
)
def test_a_file_that_is_no_recipe_is_named(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        load(*recipe(text))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="--config none.yaml: no such file"):
        load("--config", "none.yaml")


def test_an_empty_file_changes_nothing(recipe):
    assert load(*recipe("# nothing\n")) == load()


def test_help_shows_every_flag_and_no_path_of_this_machine(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help", cls=DPOConfig)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and str(ROOT) not in shown
    assert all(f"--{name} " in shown for name in asdict(load(cls=DPOConfig)))


def test_the_run_folder_is_named_by_stage_and_width():
    assert str(load("--dim", "768", cls=SFTConfig).run_dir) == "out/full_sft_768"
