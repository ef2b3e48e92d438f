"""A model of another family goes through our stages and comes out as what it was: its class, tokenizer and template."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dataset import load_tokenizer, render_chat
from model import load_pretrained
from scripts import convert
from tests.conftest import spread_weights
from tests.dataset.foreign import FAMILIES
from tests.helpers import PLAIN, make_data, train_here

CLASSES = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@pytest.mark.parametrize("family", CLASSES)
def test_sft_and_dpo_of_a_foreign_model_leave_one_of_its_own_format(tmp_path, family):
    start, data = FAMILIES[family](tmp_path / "start"), make_data(tmp_path, 12)
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    config_class, model_class = CLASSES[family]
    config = config_class(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=load_tokenizer(start).eos_id,
    )  # fmt: skip
    theirs = model_class(config)
    spread_weights(theirs)
    theirs.save_pretrained(start)
    flags = ["--out_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--max_steps", 2, "--batch_size", 2]
    flags += [*PLAIN, "--learning_rate", 1e-2, "--val_fraction", 0]
    train_here("full_sft", "--init_from", start, "--data_path", data["full_sft"], *flags)
    train_here("dpo", "--init_from", "full_sft_32", "--data_path", data["dpo"], *flags)
    folder = tmp_path / "away"
    arguments = ["--to", "hf", "--out", str(folder), "--max_shard_size", "100KB", "--license", "mit"]
    assert convert.main([str(tmp_path / "out/dpo_32"), *arguments]) == 0
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert {name: (folder / name).read_bytes() for name in before} == before
    away = AutoModelForCausalLM.from_pretrained(folder)
    assert type(away) is model_class and away.dtype == torch.float32
    ids = torch.arange(100)[None]
    with torch.no_grad():
        logits = away.eval()(ids).logits
        torch.testing.assert_close(load_pretrained(folder)(ids), logits, atol=1e-4, rtol=0)
        assert (theirs.eval()(ids).logits - logits).abs().max() > 0.01  # it did learn
    chat = [{"role": "user", "content": "Hi"}]
    there = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert render_chat(load_tokenizer(folder), chat, add_generation_prompt=True).ids == there
