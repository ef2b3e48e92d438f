"""An adapter's folder is PEFT's: what either writes the other opens, over the same base, with the same logits."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, Qwen3ForCausalLM

from model import GPT, GPTConfig, generate, load_pretrained, save_pretrained
from model.adapter_folder import load_adapter, save_adapter
from model.adapters import LoRA, Prefix, begun
from model.folder import assemble
from model.gpt import with_score
from tests.conftest import spread_weights

IDS = torch.arange(60).view(2, 30)
FAMILIES = {
    "llama, tied": {"tie_embeddings": True, "qk_norm": False},
    "qwen3, untied": {"tie_embeddings": False, "qk_norm": True},
}
SETTINGS = {
    "plain": {},
    "rslora, attention": {"rslora": True, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "dora, tokens": {"dora": True, "tokens": (1, 5, 8)},
}


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path) -> tuple[GPT, Path]:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    model = GPT(GPTConfig(**shape, **FAMILIES[request.param])).eval()
    spread_weights(model)
    save_pretrained(model, tmp_path / "base")
    return model, tmp_path / "base"


def theirs(folder: Path) -> LlamaForCausalLM | Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


@torch.no_grad()
def assert_same_logits(ours: GPT, peft: PeftModel, plain: GPT) -> None:
    expected = peft.eval()(IDS).logits
    assert (expected - plain(IDS)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ours_opened_by_them(base, tmp_path, settings):
    plain, folder = base
    adapter = LoRA(rank=4, alpha=6, base=str(folder), **settings)
    ours = assemble(plain.config, begun(plain.state_dict().items(), adapter, seed=2), adapter=adapter)
    shake(ours)
    learnt = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    save_adapter(adapter, learnt, tmp_path / "ours")
    peft = PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    assert_same_logits(ours, peft, plain)
    report = peft.load_adapter(tmp_path / "ours", "again")
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if "again" in name]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(up|v)_proj", "use_rslora": True},  # a pattern, of one layer
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "trainable_token_indices": [2, 9]},
    ],
    ids=["all", "a pattern", "dora, tokens"],
)
def test_theirs_opened_by_us(base, tmp_path, settings):
    plain, folder = base
    if "trainable_token_indices" in settings and not plain.config.tie_embeddings:
        rows = settings["trainable_token_indices"]
        settings = settings | {"trainable_token_indices": {"embed_tokens": rows, "lm_head": rows}}
    peft = get_peft_model(theirs(folder), LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings))
    shake(peft)
    peft.save_pretrained(tmp_path / "theirs")
    adapter, _ = load_adapter(tmp_path / "theirs", plain.config)
    assert (adapter.rank, adapter.alpha) == (3, 5)
    assert_same_logits(load_pretrained(tmp_path / "theirs"), peft, plain)
    assert_same_logits(load_pretrained(folder, adapters=[tmp_path / "theirs"]), peft, plain)


def test_an_adapter_that_scores_is_opened_by_them_and_theirs_by_us(base, tmp_path):
    plain, folder = base
    adapter = LoRA(rank=4, alpha=6, tokens=(1, 5), scores=True, base=str(folder))
    shape = replace(plain.config, scores=True)
    first = begun(with_score(plain.state_dict().items(), shape, 3), adapter, seed=2)
    ours = assemble(shape, first, adapter=adapter)
    shake(ours)
    learnt = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    save_adapter(adapter, learnt, tmp_path / "ours")

    opened = PeftModel.from_pretrained(scoring(folder), tmp_path / "ours").eval()
    same = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
    same(opened(IDS).logits, ours(IDS)[:, -1])
    same(load_pretrained(tmp_path / "ours")(IDS), ours(IDS))

    peft = get_peft_model(scoring(folder), LoraConfig(r=3, task_type="SEQ_CLS", target_modules="all-linear"))
    shake(peft)
    peft.save_pretrained(tmp_path / "theirs")
    same(load_pretrained(tmp_path / "theirs")(IDS)[:, -1], peft.eval()(IDS).logits)


def scoring(folder: Path) -> torch.nn.Module:
    config = {"num_labels": 1, "pad_token_id": 63, "dtype": torch.float32}
    return AutoModelForSequenceClassification.from_pretrained(folder, **config)


def test_our_prefix_opened_by_them(base, tmp_path):
    plain, folder = base
    adapter = Prefix(length=5, base=str(folder), base_hash="not asked by them")
    ours = assemble(plain.config, begun(plain.state_dict().items(), adapter, seed=2), adapter=adapter)
    spread_prefix(ours)
    learnt = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    save_adapter(adapter, learnt, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as told:
        peft = PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    assert not [warning for warning in told if "Unexpected" in str(warning.message)]  # a setting they do not know
    assert_same_logits(ours, peft, plain)
    text = [5, 6, 7]
    for _ in range(12):  # not their generate: with transformers 5 it loses the prefix
        text.append(int(peft(torch.tensor([text])).logits[0, -1].argmax()))
    assert generate(ours, [[5, 6, 7]], max_new_tokens=12, temperature=0.0)[0].ids == text[3:]


def test_their_prefix_opened_by_us(base, tmp_path):
    plain, folder = base
    peft = get_peft_model(theirs(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    peft.save_pretrained(tmp_path / "theirs")  # as they begin: normal values
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.adapter is not None and ours.adapter.prefix_length == 4
    assert_same_logits(ours, peft, plain)


def test_a_prefix_with_rows_of_tokens_is_refused_by_them(base, tmp_path):
    """They would open it without those rows."""
    plain, folder = base
    adapter = Prefix(length=5, base=str(folder), tokens=(1, 2))
    ours = assemble(plain.config, begun(plain.state_dict().items(), adapter, seed=2), adapter=adapter)
    learnt = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    save_adapter(adapter, learnt, tmp_path / "ours")
    with pytest.raises((KeyError, ValueError), match="PREFIX_TUNING_AND_TOKENS"):
        PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")


def spread_prefix(model: GPT) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".prefix"):
                parameter.normal_(generator=torch.Generator().manual_seed(4))
