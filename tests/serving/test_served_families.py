"""Models of other families are served as well, by their own tokenizer and chat template."""

import pytest
import torch
from starlette.testclient import TestClient

from dataset import load_tokenizer, render_chat
from model import GPT, GPTConfig, generate
from serving.app import create_app
from serving.engine import Served
from tests.dataset.foreign import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_another_familys_model_chats(family, tmp_path):
    FAMILIES[family](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + 9, dim=16, n_layers=1, n_heads=2, n_kv_heads=1)).eval()
    asked = {"model": family, "messages": [{"role": "user", "content": "Hi 世界"}], "max_tokens": 12, "seed": 1}
    prompt = render_chat(tokenizer, asked["messages"], add_generation_prompt=True).ids
    how = {"max_new_tokens": 12, "seed": 1, "stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size}
    decoder = tokenizer.stream_decoder(skip_control=False)
    expected = "".join(map(decoder.push, generate(model, [prompt], **how)[0].ids)) + decoder.flush()
    with TestClient(create_app([Served(family, model, tokenizer, chat=True)], slots=2), "http://localhost") as client:
        answer = client.post("v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["message"]["content"] == expected
        refused = client.post("v1/chat/completions", json=asked | {"messages": [{"role": "tool", "content": None}]})
        assert refused.status_code == 400
