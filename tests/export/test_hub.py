"""hf:// names and --push_to_hub: the real library in real processes, against a server of its few routes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import eval_model
from dataset.hub import local_path
from model import load_pretrained, save_pretrained
from tests.helpers import ROOT, TINY, make_data
from tests.hub_server import Hub, hub


def python(server: Hub, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | server.environment(tmp_path / "cache")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def server(tmp_path, make_model, tokenizer):
    """A hub with the model user/chat and the data set user/texts."""
    folder, data = tmp_path / "hub", make_data(tmp_path)
    save_pretrained(make_model(vocab_size=6400), folder / "models/user/chat")
    tokenizer.save(folder / "models/user/chat")
    (folder / "models/user/chat/weights.bin").write_bytes(b"a pickle")
    (folder / "datasets/user/texts/data").mkdir(parents=True)
    shutil.copyfile(data["full_sft"], folder / "datasets/user/texts/data/chats.jsonl")
    with hub(folder) as running:
        yield running


MANY = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, sys.argv
"""


def test_a_model_and_data_of_the_hub_are_trained_on_given_back_and_asked(server, tmp_path, capsys):
    """Three commands, one after another in one process, which saves seconds of imports."""
    run, away = tmp_path / "out/full_sft_32", tmp_path / "away"
    start = ["--init_from", "hf://user/chat", "--data_path", "hf://datasets/user/texts/data/chats.jsonl", *TINY[-4:]]
    flags = [
        *start,
        "--max_steps",
        "2",
        "--batch_size",
        "2",
        "--out_dir",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "c",
    ]
    given = ["--out", away, "--push_to_hub", "user/mine", "--license", "mit", "--language", "en", "zh"]
    asked = ["--prompt", "Hi", "--max_new_tokens", "4", "--temperature", "0"]
    lines = [
        ["train_full_sft.py", *flags],
        ["scripts/convert.py", run, "--to", "hf", *given],
        ["eval_model.py", "--model", "hf://user/mine", *asked],
    ]
    done = python(server, tmp_path, "-c", MANY, json.dumps(lines, default=str))
    assert done.returncode == 0 and "uploaded: " in done.stdout, done.stderr
    assert eval_model.main(["--model", str(run), *asked]) == 0
    assert done.stdout.endswith(capsys.readouterr().out)
    assert not any("weights.bin" in line for line in server.asked)  # what is no safetensors file is not fetched
    theirs = server.folder / "models/user/mine"
    assert {path.name for path in theirs.iterdir()} == {path.name for path in away.iterdir()}
    pushed = load_pretrained(theirs).state_dict()
    assert all(torch.equal(tensor, pushed[name]) for name, tensor in load_pretrained(run).state_dict().items())
    card = (theirs / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["language"] == ["en", "zh"] and "full-sft" in front["tags"]
    assert "Started from: user/chat." in card and "| hf://datasets/user/texts/data/chats.jsonl | 60 |" in card
    assert "batch_size: 2" in card and "| val loss | " in card and "![loss](loss.png)" in card
    assert (theirs / "loss.png").is_file() and str(tmp_path) not in card


def test_what_is_not_there_or_not_allowed_is_told_in_one_line(server, tmp_path):
    program = """
import os
os.environ["HF_TOKEN"] = "hf_wrong"
from pathlib import Path
from dataset.hub import local_path
from export.hub import upload
for refused in (lambda: local_path("hf://user/none"), lambda: upload(Path("configs"), "user/mine")):
    try:
        refused()
    except ValueError as error:
        print(error)
"""
    told = python(server, tmp_path, "-c", program).stdout.splitlines()
    assert len(told) == 2 and told[0].startswith("hf://user/none cannot be had: 404")
    assert told[1].startswith("--push_to_hub user/mine: ") and "401" in told[1] and "HF_TOKEN" in told[1]


@pytest.mark.parametrize("name", ["hf://chat", "hf://user/chat/config.json", "hf://datasets/user/texts", "hf://"])
def test_names_of_another_form_are_refused(name):
    with pytest.raises(ValueError, match="expected hf://USER/MODEL"):
        local_path(name)


def test_a_path_stays_as_it_is():
    assert local_path("out/pretrain_512") == "out/pretrain_512"
