"""Folders to give away: number format, shards, and a card of what a run left."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from evaluation.benchmark import Run, Score, write_json
from model import load_pretrained, save_pretrained
from scripts import convert
from tests.helpers import ROOT


@pytest.fixture
def run(tmp_path, make_model, tokenizer):
    """A folder as a run leaves it."""
    folder = tmp_path / "out/full_sft_32"
    save_pretrained(make_model(vocab_size=6400, qk_norm=True), folder, eos_token_id=[2, 8])
    tokenizer.save(folder)
    settings = {
        "data_path": [str(tmp_path / "*.jsonl"), "/gone/b.jsonl"],
        "init_from": str(tmp_path / "out/pretrain_32"),
    }
    (tmp_path / "a.jsonl").write_text("{}\n\n{}\n{}\n")
    header = "# python train_full_sft.py --config x\n"
    (folder / "config.yaml").write_text(header + yaml.safe_dump(settings | {"batch_size": 7}))
    records = [
        {"step": 1, "loss": 3.5, "lr": 0.1},
        {"step": 2, "loss": 2.5, "val_bpb": 0.75},
        {"step": 3, "loss": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    scores = [Score("task", "arc", "choice", 1000, 0.2725, 0.2458, 0.3010, 0.25)]
    write_json(folder / "benchmark.json", Run("x", {}, [], scores, [], {}).to_json())
    shutil.copyfile(ROOT / "docs/images/real_dpo.png", folder / "loss.png")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["f16", "bfloat16", "float32"])
def test_weights_in_the_format_and_shards_asked_for(tmp_path, run, dtype):
    wanted = {"f16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    flags = ["--to", "hf", "--out", str(tmp_path / "away"), "--dtype", dtype, "--max_shard_size", "300KB"]
    assert convert.main([str(run), *flags]) == 0
    assert len(list((tmp_path / "away").glob("model-*-of-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "away")
    assert theirs.dtype == wanted and type(theirs).__name__ == "Qwen3ForCausalLM"
    for name, tensor in load_pretrained(run).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor.to(wanted)), name


def test_a_card_says_what_the_run_left_and_not_where(tmp_path, run):
    flags = ["--to", "hf", "--out", str(tmp_path / "away"), "--license", "apache-2.0", "--language", "en", "zh"]
    assert convert.main([str(run), *flags]) == 0
    card = (tmp_path / "away/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0", "language": ["en", "zh"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["seedling", "full-sft"],
    }  # fmt: skip
    for told in (
        "A Qwen3-style model of 0.2 M parameters", "Stage: full_sft. Started from: pretrain_32.", "| *.jsonl | 3 |",
        "| b.jsonl | not read again: FileNotFoundError |", "batch_size: 7", "| loss | 2.5 |", "| val bpb | 0.75 |",
        "| arc | 1,000 | 27.3% (24.6% to 30.1%) | 25.0% |", "![loss](loss.png)",
    ):  # fmt: skip
        assert told in card, told
    assert str(tmp_path) not in card and (tmp_path / "away/loss.png").is_file()


def test_a_folder_that_no_run_made_gets_a_card_of_its_shape(tmp_path, run):
    for name in ("config.yaml", "metrics.jsonl", "benchmark.json", "loss.png"):
        (run / name).unlink()
    assert convert.main([str(run), "--to", "hf", "--out", str(tmp_path / "away")]) == 0
    card = (tmp_path / "away/README.md").read_text(encoding="utf-8")
    assert "# away" in card and [line for line in card.splitlines() if line.startswith("## ")] == ["## Use"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--to", "hf", "--dtype", "q8_0"], "--dtype q8_0 is a format of GGUF; with --to hf give f32, f16, bf16"),
        (["--to", "gguf", "--max_shard_size", "1GB"], "--max_shard_size belongs to --to hf"),
        (["--to", "hf", "--n_heads", "4"], "--n_heads is for a .pth file"),
        (["--to", "hf", "--private"], "--private belongs to --push_to_hub"),
        (["more.pth", "--to", "hf"], "a .pth file is converted alone"),
        (["more", "--to", "hf"], "more: no adapter_config.json here"),
        (["--to", "adapter_merged"], "no adapter_config.json here, so this is no adapter; a base is given as --base"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, run, capsys, flags, told):
    assert convert.main([str(run), *flags, "--out", str(tmp_path / "away")]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.glob("away*"))


def test_what_is_there_is_never_written_over(tmp_path, run, capsys):
    before = (run / "config.json").read_bytes()
    assert convert.main([str(run), "--to", "hf", "--out", str(run)]) == 2
    assert (
        "is there already; give a new name" in capsys.readouterr().err and (run / "config.json").read_bytes() == before
    )
