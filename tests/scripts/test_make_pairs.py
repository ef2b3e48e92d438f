"""Best-of-n pairs from a real model that was left a little unsure: what is written, counted and learnt from."""

import json

import pytest
import torch

from dataset import PAIR, load_tokenizer
from dataset.records import read_rows
from evaluation import Reward, Sample
from model import load_pretrained, save_pretrained
from scripts.make_pairs import SAME, UNENDED, Judged, best_and_worst, main
from tests.helpers import train_here, write_jsonl
from tests.memorised import make_memorised, user

PROMPTS = [
    {"conversations": [user("Who are you?"), {"role": "assistant", "content": "I am a seed. 🌱"}]},
    {"conversations": [user("你是谁？")], "answer": "我是一颗种子。"},
    {"conversations": [user("你是谁？" * 40)]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The memorised model with its last norm made smaller: logits are closer, so that samples differ."""
    path = make_memorised(tmp_path_factory.mktemp("model") / "full_sft_48")
    model, tokenizer = load_pretrained(path), load_tokenizer(path)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.75)
    save_pretrained(model, path, eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id)
    return path


def make(capsys, folder, out, *flags: object) -> tuple[int, str, str]:
    data = write_jsonl(out.parent / "prompts.jsonl", PROMPTS)
    line = ["--model", folder, "--data_path", data, "--out", out, "--max_new_tokens", 24, "--device", "cpu", *flags]
    status = main([str(word) for word in line])
    return status, *capsys.readouterr()


def test_the_best_answer_stands_against_the_worst(folder, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    reward = ["exact_match", "length:8"]
    status, said, _ = make(capsys, folder, out, "--reward", *reward, "--reward_weights", 1, 0.5, "--n", 16)
    assert status == 0 and "2 pairs of 2 prompts" in said and "no pair for 1: prompt longer than max_seq_len" in said
    rows = [row.value for row in read_rows([str(out)], PAIR)]
    assert [row["chosen"][:-1] for row in rows] == [PROMPTS[0]["conversations"][:1], PROMPTS[1]["conversations"]]
    judge = Reward(reward, [1, 0.5])
    for row, known in zip(rows, (["I am a seed. 🌱"], ["我是一颗种子。"]), strict=True):
        assert row["chosen"][:-1] == row["rejected"][:-1] and row["rewards"][0] > row["rewards"][1]
        best = Sample(row["chosen"][:-1], row["chosen"][-1]["content"], {"answer": known})
        assert judge([best]).total[0] == pytest.approx(row["rewards"][0])
    again = tmp_path / "again.jsonl"
    make(capsys, folder, again, "--reward", *reward, "--reward_weights", 1, 0.5, "--n", 16)
    assert again.read_bytes() == out.read_bytes()
    make(capsys, folder, again, "--reward", *reward, "--reward_weights", 1, 0.5, "--n", 16, "--seed", 1)
    assert again.read_bytes() != out.read_bytes()


def test_dpo_learns_from_what_was_written(folder, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert make(capsys, folder, out, "--reward", "exact_match", "--n", 16)[0] == 0
    flags = ["--data_path", out, "--init_from", folder, "--out_dir", tmp_path, "--cache_dir", tmp_path / "cache"]
    train_here("dpo", *flags, "--max_steps", 1, "--val_fraction", 0, "--device", "cpu", "--dtype", "float32")
    assert (tmp_path / "dpo_48/model.safetensors").is_file()


def test_a_file_without_a_pair_is_not_left_behind(folder, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    status, said, err = make(capsys, folder, out, "--reward", "length:5000", "--n", 2)
    assert status == 2 and f"no pair for 2: {SAME}" in said and "no pair is left to write" in err
    assert list(tmp_path.iterdir()) == [tmp_path / "prompts.jsonl"]


def test_cut_answers_are_never_preferred_and_ties_give_no_pair():
    a, b, cut = Judged("a", True, 1.0), Judged("b", True, 0.25), Judged("c", False, 2.0)
    assert best_and_worst([cut, b, a], 0.5) == (a, b)
    assert best_and_worst([b, a, Judged("d", False, 0.0)], 0.5) == (a, Judged("d", False, 0.0))
    assert best_and_worst([a, b], 0.75) == best_and_worst([a, a], 0.0) == SAME
    assert best_and_worst([cut, cut], 0.0) == UNENDED


@pytest.mark.parametrize("flags", [("--n", 1), ("--min_gap", -1), ("--temperature", 0), ("--reward", "nonsense")])
def test_what_cannot_be_done_is_one_line(folder, tmp_path, capsys, flags):
    status, _, err = make(capsys, folder, tmp_path / "pairs.jsonl", "--reward", "exact_match", *flags)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert json.dumps(str(flags[0]))[1:-1] in err or "found the reward 'nonsense'" in err
