"""MiniMind's weight files: state dicts with Hugging Face's names, in half precision, the head always there."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from export.pth import read_pth, write_pth
from model import load_pretrained
from scripts import convert
from tests.conftest import spread_weights
from tests.dataset.foreign import FAMILIES

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def their_model(qk_norm: bool, tied: bool, **changes):
    """As MiniMind's own converter opens its files in transformers: minimind-3 as Qwen3, minimind2 as Llama."""
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    shape = {"num_attention_heads": 4, "head_dim": 12} if qk_norm else {"num_attention_heads": 8, "head_dim": 6}
    config = config_class(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2,
        max_position_embeddings=32768, rms_norm_eps=1e-6 if qk_norm else 1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **shape | changes,
    )  # fmt: skip
    model = model_class(config).eval()
    spread_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # what the file holds
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["minimind2", "minimind-3"])
def test_a_file_is_opened_with_the_logits_of_its_network(tmp_path, qk_norm, tied):
    theirs = their_model(qk_norm, tied)
    weights = theirs.state_dict() | {"lm_head.weight": theirs.lm_head.weight.detach()}
    torch.save({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "full_sft_48.pth")
    ours = read_pth(tmp_path / "full_sft_48.pth", {})
    assert (ours.config.qk_norm, ours.config.tie_embeddings, ours.config.n_kv_heads) == (qk_norm, tied, 2)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    assert write_pth(ours, tmp_path / "again.pth", torch.float16) == []
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor.half()) for name, tensor in weights.items())


@torch.no_grad()
def test_what_no_tensor_tells_is_given_by_flags_and_told_on_the_way_back(tmp_path, capsys):
    theirs = their_model(False, True, num_attention_heads=4, head_dim=12)
    torch.save(theirs.state_dict(), tmp_path / "small.pth")
    tokenizer = FAMILIES["chatml"](tmp_path / "tokenizer")
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    flags = ["--tokenizer", str(tokenizer), "--n_heads", "4", "--max_seq_len", "64"]
    assert convert.main([str(tmp_path / "small.pth"), "--to", "hf", "--out", str(folder), *flags]) == 0
    ours = load_pretrained(folder)
    assert (ours.config.n_heads, ours.config.head_dim, ours.config.max_seq_len) == (4, 12, 64)
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    assert convert.main([str(folder), "--to", "pth", "--out", str(back), "--dtype", "float32"]) == 0
    assert "note: n_heads is 4, which the file does not say and MiniMind takes to be 8" in capsys.readouterr().out
    theirs = theirs.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in torch.load(back, weights_only=True).items())


class Code:
    def __reduce__(self):
        return print, ("code of a pickle was run",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"x": Code()}, "cannot be read as tensors"),
        ({"model": {}, "optimizer": {}}, "a state to resume from"),
        ([torch.ones(2)], "found list, expected tensors by name"),
        ({"tok_embeddings.weight": torch.ones(2)}, "names from before April 2025"),
        ({"model.layers.0.mlp.gate.weight": torch.ones(2)}, "a mixture of experts"),
        ({"wte.weight": torch.ones(2)}, "found no model.embed_tokens.weight"),
        ({"model.embed_tokens.weight": torch.ones(8, 8)}, "found no 'model.layers.0.self_attn.q_proj.weight'"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, capfd, content, told):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=told):
        read_pth(tmp_path / "x.pth", {})
    assert "code of a pickle" not in capfd.readouterr().out


def test_a_missing_tensor_is_named(tmp_path):
    weights = their_model(True, True).state_dict()
    weights.pop("model.layers.1.mlp.up_proj.weight")
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight \(64, 48\)"):
        read_pth(tmp_path / "x.pth", {})
