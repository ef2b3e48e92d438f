"""Flags and YAML: what is given is what is used, and what is not known is named with its nearest neighbour."""

from dataclasses import asdict, fields, replace

import pytest

from tests.helpers import ROOT
from training import (
    STAGES,
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    load_config,
)
from training.config import BEST, SHAPE_FLAGS, Config, Rule, rules, save_config, stage_of


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
        (["--learning-rate=1e-3"], "unknown flag --learning-rate=1e-3; here it is --learning_rate"),
        (["--batchsize", "4"], "did you mean --batch_size?"),
        (["--learn", "1e-3"], "unknown flag --learn"),  # no abbreviations either
        (["--zzzzz"], "unknown flag --zzzzz; --help lists them all"),
        (["stray"], "unknown flag stray"),
        (["--beta", "0.1"], "unknown flag --beta; a flag of train_dpo.py"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv, nearest):
    with pytest.raises(ValueError) as error:
        load(*argv)
    assert nearest in str(error.value)


def test_an_unknown_key_names_file_and_nearest(recipe):
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown key n_layers_; did you mean n_layers\?"):
        load(*recipe("n_layers_: 4\n"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "flaot16", "'flaot16'; it must be one of auto, float32, bfloat16, float16; did you mean float16"),
        ("engine", "megatron", "must be one of"),
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
        ("learning_rate", "0", "--learning_rate is 0.0; it must be more than 0"),
        ("learning_rate", ".nan", "learning_rate"),
        ("epochs", "-1", "--epochs is -1.0; it must be more than 0"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--patience", "3"], "--patience 3 needs --keep_best METRIC"),
        (
            ["--keep_best", "val_loss", "--val_fraction", "0"],
            "--keep_best val_loss compares .*--val_fraction 0 makes none",
        ),
        (
            ["--keep_best", "val_loss", "--eval_interval", "0"],
            "--keep_best val_loss compares .*--eval_interval 0 makes",
        ),
    ],
)
def test_a_best_model_that_nothing_could_tell_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        load(*argv)
    assert load("--keep_best", "val_loss", "--val_fraction", "0", "--val_path", "held_out.jsonl", "--patience", "2")


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
             "--sample_prompt", "你好: #1", "--wandb_run_name", "007",
             "--data_path", "a b.jsonl", "c.jsonl"]  # fmt: skip
    for argv in ([], flags):
        config = load(*argv, cls=cls)
        save_config(config, tmp_path / "config.yaml")
        assert load("--config", str(tmp_path / "config.yaml"), cls=cls) == config
    assert f"train_{cls.stage}.py --config" in (tmp_path / "config.yaml").read_text(encoding="utf-8").splitlines()[0]


def test_how_a_run_begins_is_not_saved(tmp_path):
    for resume in ("none", "out/pretrain_512/checkpoints/step_000200"):
        save_config(load("--resume", resume), tmp_path / "config.yaml")
        assert load("--config", str(tmp_path / "config.yaml")).resume == "auto"


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


def test_a_run_that_is_given_a_name_has_a_folder_of_that_name(recipe):
    assert str(load("--run_name", "wide, lr 2e-3", "--out_dir", "runs").run_dir) == "runs/wide, lr 2e-3"
    assert str(load(*recipe("run_name: 7")).run_dir) == "out/7"


@pytest.mark.parametrize("name", ["", ".", "..", "none", "a/b", "/tmp", "a\\b"])
def test_a_run_name_that_is_no_folders_is_refused(name):
    with pytest.raises(ValueError, match="--run_name is .*; it must be the name of one folder in --out_dir"):
        load("--run_name", name)


def test_the_stage_of_a_model_folder_is_what_made_it_whatever_its_name(tmp_path):
    runs = {name: tmp_path / name for name in ("wide", "full_sft_64", "dpo_64", "elsewhere")}
    for run in runs.values():
        (run / BEST).mkdir(parents=True)
    save_config(SFTConfig(run_name="wide"), runs["wide"] / "config.yaml")
    save_config(PretrainConfig(run_name="full_sft_64"), runs["full_sft_64"] / "config.yaml")
    expected = {"wide": "full_sft", "full_sft_64": "pretrain", "dpo_64": "dpo", "elsewhere": None}
    assert {name: stage_of(run) for name, run in runs.items()} == expected
    assert {name: stage_of(run / BEST) for name, run in runs.items()} == expected


# Rules ----------------------------------------------------------------------------------------------------------

CONFIGS = [stage.config for stage in STAGES.values()]


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_flag_has_a_rule_that_says_what_a_change_means_at_a_resume(cls):
    found = rules(cls)
    assert list(found) == [f.name for f in fields(cls)]
    assert all(rule.help and rule.group for rule in found.values())
    assert {rule.resume for rule in found.values()} == {"refuse", "note", "free"}


@pytest.mark.parametrize("cls", CONFIGS)
def test_what_makes_another_run_is_refused_and_what_bends_it_is_noted(cls):
    found = {name: rule.resume for name, rule in rules(cls).items()}
    assert {found[name] for name in (*SHAPE_FLAGS, "max_seq_len", "optimizer", "seed")} == {"refuse"}
    noted = ("beta1", "beta2", "decay_fraction", "lr_schedule", "learning_rate", "weight_decay", "batch_size", "dtype")
    assert {found[name] for name in noted} == {"note"}
    assert {found[name] for name in ("log_interval", "grad_checkpointing", "compile", "cache_dir")} == {"free"}


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_default_of_a_stage_keeps_the_rule_all_stages_have(cls):
    shared = rules(Config)
    changed = {name for name, rule in rules(cls).items() if name in shared and rule != shared[name]}
    prompts = {"batch_size", "global_batch_size", "eval_rows", "sample_interval", "compile"}
    pairs, open_ = {"batch_size"}, {"optimizer", "learning_rate"}
    expected = {
        PretrainConfig: open_,
        DPOConfig: pairs,
        RewardConfig: pairs,
        DistillConfig: pairs,
        GRPOConfig: prompts,
        PPOConfig: prompts,
    }
    assert changed == expected.get(cls, set())
    for name in changed:  # it says more, and bounds the same
        assert replace(rules(cls)[name], help="") == replace(shared[name], help="")


def edges(cls) -> list[tuple[str, float, bool]]:
    """(flag, value, whether its rule allows it) at every bound of every rule."""
    found: list[tuple[str, float, bool]] = []
    for name, rule in rules(cls).items():
        if rule.at_least is not None:
            found += [(name, rule.at_least, True), (name, rule.at_least - 1, False)]
        if rule.above is not None:
            found += [(name, rule.above, False), (name, rule.above + 1e-6, True)]
        if rule.below is not None:
            found += [(name, rule.below, False), (name, rule.below - 1e-6, True)]
        if (rule.at_least, rule.above, rule.below) != (None, None, None):
            found.append((name, float("nan"), False))
    return found


READ_BY = {  # flags that are read beside others only
    "label_smoothing": {"loss_type": "robust"},
    "simpo_gamma": {"loss_type": "simpo"},
    "orpo_lambda": {"loss_type": "orpo"},
    "desirable_weight": {"loss_type": "kto"},
    "undesirable_weight": {"loss_type": "kto"},
    "bottleneck_size": {"adapter": "bottleneck"},
    "prefix_length": {"adapter": "prefix"},
} | {name: {"adapter": "lora"} for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")}


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_range_in_a_rule_is_kept_to_its_edge(cls):
    checked = edges(cls)
    assert len({name for name, _, _ in checked}) > 15
    drawn = {flag: {"on_policy": True} for flag in ("group_size", "max_new_tokens", "temperature")}
    read_by = READ_BY | (drawn if cls is DistillConfig else {})
    for name, value, allowed in checked:
        config = cls(**{name: value} | read_by.get(name, {}))
        if allowed:
            config.check()
        else:
            with pytest.raises(ValueError, match=f"^--{name} is {value}; it must be "):
                config.check()


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "expected"),
    [
        ({"at_least": 1}, [1, 1.5, 10**9], [0, 0.999], "at least 1"),
        ({"above": 0}, [1e-9, 7], [0, -1], "more than 0"),
        ({"at_least": 0, "below": 1}, [0, 0.5, 0.999], [-0.1, 1, 2], r"in \[0, 1\)"),
        ({}, [-1, 0, "text", None, float("nan")], [], ""),
    ],
)
def test_a_rule_alone_decides_a_range(bounds, good, bad, expected):
    rule = Rule("help", "group", **bounds)
    for value in good:
        rule.check("name", value)
    for value in bad:
        with pytest.raises(ValueError, match=f"--name is {value}; it must be {expected}"):
            rule.check("name", value)


def test_what_is_not_given_is_in_no_range():
    config = load()
    assert config.min_lr is config.warmup_steps is config.max_seq_len is None
    config.check()


# Flags with a third answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compile", "fsdp_reshard"])
def test_a_switch_may_be_left_to_the_machine_and_is_not_recorded_then(recipe, tmp_path, name):
    assert getattr(load(), name) is None
    for argv, value in (([f"--{name}"], True), ([f"--{name}", "no"], False), (recipe(f"{name}: false"), False)):
        config = load(*argv)
        assert getattr(config, name) is value
        save_config(config, tmp_path / "saved.yaml")
        assert getattr(load("--config", str(tmp_path / "saved.yaml")), name) is value
    save_config(load(), tmp_path / "saved.yaml")
    assert name not in (tmp_path / "saved.yaml").read_text()  # so that versions that know no third answer read it
