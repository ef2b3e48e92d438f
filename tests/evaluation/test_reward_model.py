"""A reward model as a judge and on a file of pairs: scores, shares with their intervals, calibration."""

import json
import math
import random

import pytest
import torch

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from evaluation import Reward, Sample, score_file
from evaluation.calibration import by_kind, groups, interval, told_apart
from evaluation.reward_model import RewardModel, judges
from model import GPT, GPTConfig, generate, load_pretrained, save_pretrained
from tests.conftest import spread_weights
from tests.helpers import write_jsonl
from tests.memorised import assistant, user

CHATS = [
    Sample([user("Who are you?")], "I am a seed.", {}),
    Sample([user("你是谁？")], "我是一颗种子。", {}, "length"),
    Sample([user("Weather?"), assistant("Where?"), user("In Rome.")], "<think>warm</think>It rains. " * 3, {}),
    Sample([user("Hi")], "", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "reward_32"
    model = GPT(GPTConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48, scores=True))
    spread_weights(model)
    save_pretrained(model, path)
    load_tokenizer(DEFAULT_TOKENIZER).save(path)
    return path


# Asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_score_does_not_depend_on_what_is_beside_it(folder, batch_size):
    scorer = RewardModel(load_pretrained(folder), load_tokenizer(folder), batch_size)
    alone = [scorer([sample])[0] for sample in CHATS]
    assert scorer(CHATS) == pytest.approx(alone, abs=1e-5) and len({round(each, 3) for each in alone}) == 4
    assert scorer(CHATS) == scorer(CHATS)


def test_what_is_read_is_the_conversation_with_the_answers_end(folder, tokenizer):
    scorer = RewardModel.load(folder)
    for sample in CHATS:
        ids = scorer.ids(sample)
        assert len(ids) <= 48 and (ids[-1] in tokenizer.stop_ids) == (len(ids) < 48)
    assert len(scorer.ids(CHATS[2])) == 48  # cut at the context


def test_it_is_a_reward_by_its_folder(folder):
    reward = Reward([f"reward_model:{folder}", "length:100"], [2.0, 1.0], judges())
    scores = reward(CHATS)
    alone = RewardModel.load(folder)(CHATS)
    assert scores.parts["reward_model"] == pytest.approx(alone, abs=1e-6)
    assert scores.total[0] == pytest.approx(2 * alone[0] + 1)


def test_a_model_that_writes_is_no_reward_and_one_that_scores_writes_nothing(folder, tmp_path, make_model, tokenizer):
    save_pretrained(make_model(vocab_size=tokenizer.vocab_size), tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=rf"reward_model:{tmp_path}: found a model that writes"):
        Reward([f"reward_model:{tmp_path}"], judges=judges())
    with pytest.raises(FileNotFoundError, match=r"nowhere: no config.json"):
        Reward(["reward_model:nowhere"], judges=judges())
    with pytest.raises(ValueError, match="is a reward model: it scores answers and writes none"):
        generate(load_pretrained(folder), [[1, 2]], max_new_tokens=3)


# Numbers ----------------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_true_share_about_19_times_in_20():
    rng = random.Random(0)
    for share, pairs in ((0.5, 60), (0.9, 60), (0.98, 240)):
        held = 0
        for _ in range(2000):
            low, high = interval(sum(rng.random() < share for _ in range(pairs)), pairs)
            held += low <= share <= high
        assert 0.93 < held / 2000 < 0.98, (share, pairs)
    assert interval(60, 60)[0] == pytest.approx(60 / (60 + 1.959964**2)) and interval(60, 60)[1] == 1
    assert interval(0, 10)[0] == 0


def test_a_score_that_says_how_often_it_is_right_has_no_calibration_error_and_a_boastful_one_has():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(20000, generator=generator) * 4  # the margin that a score of perfect knowledge would have
    right = torch.rand(20000, generator=generator) < sure.sigmoid()
    margins = torch.where(right, sure, -sure)
    found = told_apart(margins)
    assert found["calibration_error"] < 0.01
    assert found["accuracy"] == pytest.approx(float(sure.sigmoid().mean()), abs=0.01)
    boastful = told_apart(margins * 5)
    assert boastful["accuracy"] == found["accuracy"] and boastful["calibration_error"] > 0.1
    assert [each.pairs for each in groups(margins)] == [2000] * 10


def test_ties_are_not_right_and_kinds_are_counted_apart():
    margins = torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert told_apart(margins)["accuracy"] == 0.5
    found = by_kind(margins, ["b", "a", "a", "b"])
    assert list(found) == ["a", "b"]
    assert [(each["pairs"], each["accuracy"]) for each in found.values()] == [(2, 0.0), (2, 1.0)]


# A file -----------------------------------------------------------------------------------------------------------


def test_a_file_of_pairs_is_scored_by_kind_with_a_picture(folder, tmp_path):
    pairs = [("a house", "a tree"), ("red", "blue red"), ("the old fox", "cat"), ("again", "again and again")]
    rows = [
        {side: [user("Say it."), assistant(text)] for side, text in (("chosen", w), ("rejected", v))}
        | {"kind": ("long", "short")[i % 2]}
        for i, (w, v) in enumerate(pairs)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    result = score_file(model, tokenizer, path, plots=tmp_path)
    scorer = RewardModel(model, tokenizer)
    margins = [
        scorer([Sample([user("Say it.")], w, {})])[0] - scorer([Sample([user("Say it.")], v, {})])[0] for w, v in pairs
    ]
    assert result["margin"] == pytest.approx(math.fsum(margins) / 4, abs=1e-5)
    assert result["accuracy"] == sum(each > 0 for each in margins) / 4 and result["form"] == "reward"
    assert result["by_kind"]["short"]["margin"] == pytest.approx((margins[1] + margins[3]) / 2, abs=1e-5)
    assert (tmp_path / "calibration_pairs.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(result)) == result
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a house"}])
    with pytest.raises(ValueError, match=r"rows for train_pretrain.py, expected pairs for a reward model"):
        score_file(model, tokenizer, text)
