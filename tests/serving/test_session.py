"""A session says nothing itself: what there is to tell beside the answers goes to its caller, when it happens."""

import pytest
import torch

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from model import GPT, GPTConfig
from serving import AnswerCut, ContextFull, Session


@pytest.fixture
def model() -> GPT:
    """It never stops by itself: the end tokens are the least likely of all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=48)).eval()
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[list(tokenizer.stop_ids), 0] = -100.0
        model.model.norm.weight.fill_(0.0)
        model.model.norm.weight[0] = 1.0
    return model


def test_what_is_left_out_is_told_before_an_answer_and_what_cut_it_after(model, capfd):
    told: list[object] = []
    session = Session(model, load_tokenizer(DEFAULT_TOKENIZER), {"max_new_tokens": 5}, seed=0, notice=told.append)
    full = []
    for i in range(6):
        told.clear()
        for piece in session.answer(f"Question {i}"):
            told.append(piece)
        if isinstance(told[0], ContextFull):
            full.append(told.pop(0))
        assert told.pop() == AnswerCut("max_new_tokens", 5)
        assert "".join(map(str, told)) == session.messages[-1]["content"]
    assert full and set(full) == {ContextFull(2)} and session.forgotten == 2 * len(full)
    assert capfd.readouterr() == ("", "")


def test_a_context_that_ends_an_answer_is_told(model):
    told: list[object] = []
    session = Session(model, load_tokenizer(DEFAULT_TOKENIZER), {"max_new_tokens": 500}, seed=0, notice=told.append)
    list(session.answer("Tell me"))
    assert told == [AnswerCut("context", 48)]


def test_nobody_need_listen(model):
    session = Session(model, load_tokenizer(DEFAULT_TOKENIZER), {"max_new_tokens": 3}, seed=0)
    list(session.answer("Tell me"))
    assert len(session.messages) == 2


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_chats():
    torch.manual_seed(0)
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    model = GPT(GPTConfig(vocab_size=60_000, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=48)).eval()
    for raw in (False, True):
        assert list(Session(model, tokenizer, {"max_new_tokens": 20, "temperature": 2.0}, seed=0, raw=raw).answer("Hi"))
