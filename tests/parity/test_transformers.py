"""Our network is transformers' Llama and Qwen3: the same folder gives the same logits and the same text, both ways."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from evaluation import Sample
from evaluation.reward_model import RewardModel
from model import GPTConfig, generate, load_config, load_pretrained, save_pretrained
from tests.conftest import spread_weights

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PROMPTS = [[1, 71, 90, 5, 33], [1, 200, 4]]


def their_model(family: str, tied: bool, rope: dict | None = None):
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=160, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e4} | (rope or {}),
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = model_class(config).eval()
    spread_weights(model)
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs) -> None:
    """Within 1e-4 over 160 positions."""
    ids = torch.randint(0, 256, (2, 160), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # far from uniform, so that equal means something
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


def assert_same_text(ours, theirs) -> None:
    """64 greedy tokens equal: ours in one batch of different lengths, theirs a prompt at a time."""
    answers = generate(ours, PROMPTS, max_new_tokens=64, temperature=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        assert answer.ids == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_their_folder_opened_by_us(tmp_path, family, tied):
    theirs = their_model(family, tied)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    assert_same_text(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_our_folder_opened_by_them(tmp_path, make_model, family, tied):
    ours = make_model(
        vocab_size=256, dim=48, head_dim=20, max_seq_len=160, tie_embeddings=tied, qk_norm=family == "qwen3"
    )
    save_pretrained(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(theirs) is FAMILIES[family][1]
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    assert_same_logits(ours, theirs.eval())
    assert_same_text(ours, theirs)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["llama3", "linear"])
def test_scaled_rotary_positions(tmp_path, rope):
    theirs = their_model("llama", True, rope)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert_same_logits(ours, theirs)
    save_pretrained(ours, tmp_path / "ours")
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval())


def test_weights_in_shards_with_an_index(tmp_path):
    theirs = their_model("llama", False)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(load_pretrained(tmp_path), theirs)


def test_config_keys_of_older_transformers():
    """4.x wrote rope_theta and rope_scaling beside each other, with the type under "type"."""
    old = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    config = GPTConfig.from_hf(old)
    assert (config.rope_theta, config.n_kv_heads, config.head_dim, config.tie_embeddings) == (5e5, 4, 12, False)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


# Reward models --------------------------------------------------------------------------------------------------------

CHATS = [
    ("Which is heavier?", "The horse is heavier."),
    ("你好！", "你好"),
    ("Say nothing.", ""),
    ("Count.", "1 2 3 " * 9),
]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_a_reward_model_is_opened_by_them_with_the_same_scores(tmp_path, make_model, tokenizer, qk_norm, tied):
    """They render the chat, pad it and look for the last token, all by what stands in the folder."""
    model = make_model(
        scores=True, qk_norm=qk_norm, tie_embeddings=tied, vocab_size=tokenizer.vocab_size, max_seq_len=96
    )
    save_pretrained(model, tmp_path, pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.bos_id)
    tokenizer.save(tmp_path)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chats, tokenize=True, padding=True, return_tensors="pt", return_dict=True
    )
    expected = theirs(**batch).logits[:, 0]
    scores = RewardModel.load(tmp_path)([Sample(chat[:1], chat[1]["content"], {}) for chat in chats])
    assert expected.std() > 0.1 and type(theirs).__name__.startswith("Qwen3" if qk_norm else "Llama")
    torch.testing.assert_close(torch.tensor(scores, dtype=torch.float32), expected, atol=1e-4, rtol=0)


def test_a_reward_model_of_theirs_is_opened_by_us_and_one_of_several_labels_is_not(tmp_path):
    from transformers import LlamaForSequenceClassification

    for labels in (1, 2, 3):
        config = their_model("llama", True).config
        config.num_labels, config.pad_token_id = labels, 0
        theirs = LlamaForSequenceClassification(config).eval()
        spread_weights(theirs)
        theirs.save_pretrained(tmp_path / str(labels))
    ids = torch.tensor([[1, 71, 90, 5, 33], [1, 200, 4, 9, 7]])
    with torch.no_grad():
        config.num_labels = 1
        ours = load_pretrained(tmp_path / "1")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1").eval()
        torch.testing.assert_close(ours(ids)[:, -1], theirs(ids).logits, atol=1e-4, rtol=0)
    for labels in (2, 3):
        with pytest.raises(ValueError, match=f"a head for {labels} labels"):
            load_config(tmp_path / str(labels))
