"""`--help` of the scripts that have flags of their own, or a stage's: what they do, and what every flag means."""

import re

import pytest

import eval_model
from scripts import benchmark, memory, train_tokenizer
from training import ALONE, PretrainConfig, load_config
from training.config import rules


def shown_by(capsys: pytest.CaptureFixture[str], *call) -> str:
    with pytest.raises(SystemExit) as stop:
        call[0](*call[1:])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_of_the_benchmark_says_what_it_measures_and_where_a_stages_flags_are_listed(capsys):
    shown = " ".join(shown_by(capsys, benchmark.parse, ["--help"]).split())
    assert f"of {', '.join(ALONE)}, decode, input" in shown and "real tokens a second" in shown
    assert "--max_steps are the updates measured" in shown and "docs/flags.md" in shown


def test_help_of_a_tool_with_a_stages_flags_begins_with_what_the_tool_does(capsys):
    shown = shown_by(capsys, load_config, PretrainConfig, ["--help"], memory.__doc__)
    assert "What does one rank hold?" in shown and "torchrun --nproc_per_node 2 scripts/memory.py" in shown
    assert "--zero_stage" in shown and PretrainConfig.__doc__ not in shown


def test_help_of_the_tokenizer_trainer_shows_every_default(capsys):
    shown = shown_by(capsys, train_tokenizer.parse_arguments, ["--help"]).split("options:")[1]
    options = re.split(r"\n  --", shown)[1:]
    assert len(options) == 9
    assert all(" [" in option for option in options if not option.startswith(("data_path", "out_dir")))


def test_help_of_eval_model_shows_dim_and_the_flags_that_are_only_checked(capsys):
    shown = " ".join(shown_by(capsys, eval_model.parse_arguments, ["--help"]).split())
    assert "--dim int width: open {stage}_{dim}" in shown
    assert "checked against the folder's config.json: --n_layers int blocks" in shown


def test_help_of_offload_names_every_value_and_where_it_keeps_state():
    text = rules(PretrainConfig)["offload"].help
    assert re.search(r"none \(.*cpu \(host memory.*nvme \(a disk", text)
