"""Scores against transformers' model, one row at a time and without padding, and against answers known by heart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset import DEFAULT_TOKENIZER, DataError, load_tokenizer, render_chat
from dataset.records import form_of
from dataset.tokenizer import Tokenizer
from evaluation.scoring import score_file, windows
from model import GPT, GPTConfig, load_pretrained, save_pretrained
from tests.conftest import spread_weights
from tests.memorised import CONVERSATIONS, assistant, make_memorised, user

CONTEXT = 32


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_folder(folder: Path, seed: int) -> Path:
    model = GPT(GPTConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=CONTEXT))
    spread_weights(model, seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.3)  # else every loss is huge
    save_pretrained(model, folder)
    load_tokenizer(DEFAULT_TOKENIZER).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "a", seed=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "b", seed=1)


def token_logps(folder: Path, ids: list[int]) -> list[float]:
    """log p of ids[1:], each after all ids before it, by transformers."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logps = hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(logps[i, token]) for i, token in enumerate(ids[1:])]


TEXTS = [
    "Once upon a time there was a seed.",
    "从前有一颗种子，它在土里睡觉。" * 6,
    "x",
    "The end of the story is near. " * 9,
]


def test_text_is_scored_like_transformers_does(folder, tokenizer, tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids) - 1, CONTEXT):
            logps = token_logps(folder, ids[start : start + CONTEXT + 1])
            nats, tokens = nats - sum(logps), tokens + len(logps)
    for batch_size in (1, 3, 64):
        result = score_file(load_pretrained(folder), tokenizer, path, batch_size=batch_size)
        assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert result["bits_per_byte"] == pytest.approx(
            nats / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-5
        )
        assert (result["form"], result["rows"], result["tokens"], result["windowed_rows"]) == ("pretrain", 4, tokens, 2)


@pytest.mark.parametrize("length", [2, 32, 33, 34, 65, 100])
def test_windows_predict_every_token_but_the_first_once(length):
    ids = list(range(10, 10 + length))
    pieces = windows(ids, CONTEXT)
    assert [label for piece in pieces for label in piece.labels.tolist()] == ids[1:]
    assert [token for piece in pieces for token in piece.input_ids.tolist()] == ids[:-1]
    assert max(len(piece.labels) for piece in pieces) <= CONTEXT


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary(tokenizer, tmp_path):
    model = GPT(GPTConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=CONTEXT)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    path = write(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    result = score_file(model, tokenizer, path)
    assert result["loss"] == pytest.approx(math.log(6400)) and result["perplexity"] == pytest.approx(6400, rel=1e-4)


CHATS = [
    [user("Hi"), assistant("Hello there")],
    [
        {"role": "system", "content": "Be kind"},
        user("你好"),
        assistant("好"),
        user("again"),
        assistant("yes", reasoning_content="so"),
    ],
    [user("Tell me"), assistant("a long story " * 12)],  # cut inside its answer
    [user("why " * 40), assistant("because")],  # no room for an answer: dropped
]


def test_answers_are_scored_like_transformers_does(folder, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", [{"conversations": chat} for chat in CHATS])
    logps: list[float] = []
    for chat in CHATS[:3]:
        ids, mask = render_chat(tokenizer, chat)
        ids, mask = ids[: CONTEXT + 1], mask[: CONTEXT + 1]
        logps += [logp for logp, supervised in zip(token_logps(folder, ids), mask[1:], strict=True) if supervised]
    result = score_file(load_pretrained(folder), tokenizer, path, batch_size=2, max_new_tokens=8)
    assert result["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)
    assert (result["rows"], result["tokens"]) == (3, len(logps))
    assert result["dropped"] == {"prompt longer than max_seq_len": 1}
    assert result["cut"]["inside an answer"] == 1
    assert (result["generated_rows"], result["too_long_to_generate"]) == (2, 1)


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {side: [user(prompt), assistant(answer)] for side, answer in (("chosen", chosen), ("rejected", rejected))}


PAIRS = [
    pair("Hi", "Hello there", "no"),
    pair("你好", "好", "不知道，走开"),
    pair("Count", "one two", "one two three"),
    pair("Say", "yes", "no, never " * 20),  # cut
    pair("Same", "one", "one"),  # dropped: nothing to prefer
]


def answer_logp(folder: Path, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> float:
    ids, mask = render_chat(tokenizer, messages)
    ids, mask = ids[: CONTEXT + 1], mask[: CONTEXT + 1]
    return sum(logp for logp, mine in zip(token_logps(folder, ids), mask[1:], strict=True) if mine)


def test_preferences_are_scored_like_transformers_does(folder, reference, tokenizer, tmp_path):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    margins: dict[Path, list[float]] = {
        f: [answer_logp(f, tokenizer, p["chosen"]) - answer_logp(f, tokenizer, p["rejected"]) for p in PAIRS[:4]]
        for f in (folder, reference)
    }
    model = load_pretrained(folder)
    result = score_file(model, tokenizer, path, batch_size=3, reference=load_pretrained(reference))
    rewards = [a - b for a, b in zip(margins[folder], margins[reference], strict=True)]
    for name, values in (("", margins[folder]), ("reward_", rewards)):
        assert result[f"{name}margin"] == pytest.approx(sum(values) / 4, rel=1e-4)
        assert result[f"{name}accuracy"] == sum(value > 0 for value in values) / 4
    assert (result["rows"], result["dropped"]) == (4, {"same answer on both sides": 1})
    assert result["cut"]["inside an answer"] == 1
    assert "reward_margin" not in score_file(model, tokenizer, path)


# Answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> GPT:
    return load_pretrained(make_memorised(tmp_path_factory.mktemp("memorised")))


def test_exact_match_compares_whole_final_turns(memorised, tokenizer, tmp_path):
    """Reasoning and tool calls are part of a turn; outer white space is not; a longer or shorter answer is wrong."""
    wrong = [
        [user("Who are you?"), assistant("I am a seed.")],
        [user("你是谁？"), assistant("我是一颗种子。是的")],
        [user("Weather in Rome?"), assistant("Let me look. ")],  # without its call
        [*CONVERSATIONS[2][:3], assistant("7")],
    ]
    spaced = [[user("你是谁？"), assistant("我是一颗种子。\n")]]
    for rows, share in ((CONVERSATIONS, 1.0), (wrong, 0.0), (spaced, 1.0), (CONVERSATIONS + wrong, 0.5)):
        path = write(tmp_path / "chat.jsonl", [{"conversations": row} for row in rows])
        result = score_file(memorised, tokenizer, path, batch_size=3)
        assert (result["exact_match"], result["stopped"]) == (share, 1.0)
        assert (result["generated_rows"], result["too_long_to_generate"]) == (len(rows), 0)


def test_open_answers_to_the_prompts_of_pairs_are_looked_at(memorised, tokenizer, tmp_path):
    """Each prompt once; the same model as its own reference answers at the same length."""
    asked = [[user("Who are you?")], [user("Who are you?")], [user("你是谁？")]]
    rows = [{"chosen": [*a, assistant(f"{i}")], "rejected": [*a, assistant("x")]} for i, a in enumerate(asked)]
    path = write(tmp_path / "pairs.jsonl", rows)
    result = score_file(memorised, tokenizer, path, reference=memorised)
    assert (result["ended"], result["no_loops"], result["length_ratio"]) == (1.0, 1.0, 1.0)
    lengths = [len(tokenizer.encode(text)) for text in ("I am a seed. 🌱", "我是一颗种子。")]
    assert result["answer_tokens"] == sum(lengths) / 2
    cut = score_file(memorised, tokenizer, path, max_new_tokens=2)
    assert cut["ended"] == 0.0 and "length_ratio" not in cut


def test_answers_longer_than_max_new_tokens_are_counted_not_generated(memorised, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", [{"conversations": row} for row in CONVERSATIONS])
    result = score_file(memorised, tokenizer, path, max_new_tokens=3)  # only "6" and its end are that short
    assert (result["exact_match"], result["generated_rows"], result["too_long_to_generate"]) == (1.0, 1, 3)
    result = score_file(memorised, tokenizer, path, max_new_tokens=1)
    assert (result["exact_match"], result["stopped"], result["generated_rows"]) == (None, None, 0)


def test_max_rows_takes_the_first_rows(memorised, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", [{"conversations": row} for row in CONVERSATIONS])
    first = write(tmp_path / "first.jsonl", [{"conversations": row} for row in CONVERSATIONS[:2]])
    result = score_file(memorised, tokenizer, path, max_rows=2)
    assert result == score_file(memorised, tokenizer, first) | {"file": str(path)}


# Rows -----------------------------------------------------------------------------------------------------------


def test_the_form_is_that_of_the_first_readable_row(tmp_path):
    for row, form in (({"text": ""}, "pretrain"), ({"messages": []}, "full_sft"), (PAIRS[0], "dpo")):
        path = tmp_path / "rows.jsonl"
        path.write_text('\n{"broken\n[1]\n"text"\n' + json.dumps(row) + "\n")
        assert form_of(path).stage == form


def test_a_file_without_such_a_row_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "?"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: found no row of a known form, expected .*text.*chosen"):
        form_of(path)


def test_a_bad_row_is_named_and_nothing_left_is_an_error(folder, tokenizer, tmp_path):
    model = load_pretrained(folder)
    with pytest.raises(DataError, match=r"text.jsonl:2: found a number as text"):
        score_file(model, tokenizer, write(tmp_path / "text.jsonl", [{"text": "a"}, {"text": 3}]))
    with pytest.raises(ValueError, match="no row is left to score; dropped: {'same answer on both sides': 1}"):
        score_file(model, tokenizer, write(tmp_path / "pairs.jsonl", PAIRS[-1:]))
