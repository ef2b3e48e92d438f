"""Adapters: what they leave as it was, what they learn, and that beside the weights, merged and saved LoRA says the
same; bottlenecks and prefixes against networks written without them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import GPT, generate, load_pretrained, save_pretrained
from model.adapter_folder import base_folder, load_adapter, save_adapter, tokenizer_folder
from model.adapters import LINEAR, Adapter, Bottleneck, LoRA, LoRALinear, Prefix, begun, merged, switched_off
from model.attention import Layout
from model.folder import assemble, folder_weights, weights_hash
from model.gpt import nll_by_place, summed_nll

SETTINGS = {
    "lora": {},
    "attention": {"targets": ("q_proj", "o_proj"), "rslora": True},
    "dora": {"dora": True},
    "tokens": {"tokens": (1, 4, 7)},
    "all of it, untied": {"dora": True, "tokens": (0, 9), "targets": (*LINEAR,)},
}
IDS = torch.arange(5, 65).view(2, 30)


@pytest.fixture(params=SETTINGS)
def pair(request, make_model) -> tuple[GPT, GPT]:
    """A network, and the same with an adapter that has learnt nothing."""
    base = make_model(tie_embeddings="untied" not in request.param)
    return base, adapted(base, LoRA(rank=4, alpha=6, **SETTINGS[request.param]))


def adapted(base: GPT, adapter: Adapter) -> GPT:
    return assemble(base.config, begun(base.state_dict().items(), adapter, seed=3), adapter=adapter)


def learnt(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def shake(model: GPT) -> GPT:
    """As after some training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in learnt(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@torch.no_grad()
def apart(one: GPT, other: GPT) -> float:
    """The largest difference of their logits, as a share of the largest logit."""
    logits = one(IDS)
    return float((logits - other(IDS)).abs().max() / logits.abs().max())


def test_an_adapter_that_has_learnt_nothing_changes_no_bit(pair):
    base, model = pair
    assert torch.equal(model(IDS), base(IDS))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.state_dict().items())


def test_merged_is_unmerged(pair):
    base, model = pair
    shake(model)
    weights = dict(merged(base.state_dict().items(), model.adapter, learnt(model)))
    plain = assemble(base.config, weights.items())
    assert apart(plain, model) < 1e-5 < 1e-3 < apart(base, model)
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    prompts = [[5, 6, 7], [8]]
    assert generate(model, prompts, **settings) == generate(plain, prompts, **settings)


def test_only_the_adapter_learns_and_it_learns_what_the_merged_weights_say(pair):
    """Gradients against those of the merged weights, taken through them by the chain rule; both ways of the loss."""
    base, model = pair
    shake(model)
    found = []
    for criterion in (summed_nll, nll_by_place):
        model.zero_grad()
        model(IDS[:, :-1], labels=IDS[:, 1:], criterion=criterion)[0].sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in learnt(model).items()}
    weights = dict(merged(base.state_dict().items(), model.adapter, leaves))
    logits = torch.func.functional_call(base, weights, (IDS[:, :-1],))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-4)
        if not model.adapter.dora:  # whose divisor has no gradient, by definition
            torch.testing.assert_close(found[0][name], leaf.grad, rtol=1e-3, atol=1e-3)


def test_dora_is_the_paper_s_formula(make_model):
    """Equation 5, its norm a constant: written out for one layer."""
    base = make_model()
    model = shake(adapted(base, LoRA(rank=3, alpha=6, dora=True, targets=("up_proj",))))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, base.config.dim)
    a, b, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    direction = layer.weight + 2 * b @ a
    expected = x @ (m[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()).T
    torch.testing.assert_close(layer(x), expected)
    got, wanted = (torch.autograd.grad(y.square().sum(), (a, b, m)) for y in (layer(x), expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_falls_on_what_enters_a_and_only_in_training(make_model):
    model = shake(adapted(make_model(), LoRA(dropout=0.5)))
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_first_values_follow_from_the_seed(make_model):
    base, adapter = make_model(), LoRA(rank=2)
    one, again, other = (dict(begun(base.state_dict().items(), adapter, seed)) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.lora_A"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])


def test_sizes(make_model):
    base = make_model()
    model = adapted(base, LoRA(rank=4))
    kinds = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(kinds) == 7 * base.config.n_layers
    assert model.num_parameters(learnt=True) == sum(4 * (m.in_features + m.out_features) for m in kinds)
    assert model.num_parameters() == base.num_parameters() + model.num_parameters(learnt=True)
    matmul = base.config.multiplied()
    assert model.flops_per_token(0) == 4 * matmul + 6 * model.num_parameters(learnt=True)
    assert base.flops_per_token(64) == base.config.flops_per_token(64)


def test_a_target_that_is_not_there_is_named(make_model):
    with pytest.raises(ValueError, match=r"'w_q' names no linear layer of a block; there are q_proj"):
        GPT(make_model().config, LoRA(targets=("q_proj", "w_q")))


# Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(pair, tmp_path) -> tuple[GPT, Path]:
    base, model = pair
    save_pretrained(base, tmp_path / "runs" / "base")
    object.__setattr__(model.adapter, "base", "elsewhere/runs/base")
    save_adapter(model.adapter, learnt(shake(model)), tmp_path / "runs" / "tuned")
    return model, tmp_path / "runs" / "tuned"


def test_a_folder_brings_back_the_adapter_and_opens_as_a_plain_model(saved):
    model, folder = saved
    adapter, weights = load_adapter(folder, model.config)
    assert adapter == model.adapter
    assert weights.keys() == learnt(model).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in learnt(model).items())
    assert base_folder(folder) == folder.parent / "base"  # a tree of runs that was moved
    opened = load_pretrained(folder)
    assert opened.adapter is None and apart(opened, model) < 1e-5
    twice = load_pretrained(folder.parent / "base", adapters=[folder, folder])
    again = dict(merged(opened.state_dict().items(), adapter, weights))
    assert all(torch.equal(twice.state_dict()[name], again[name]) for name in again)
    assert tokenizer_folder(folder) == folder
    (folder.parent / "base" / "tokenizer.json").touch()
    assert tokenizer_folder(folder) == folder.parent / "base"


def test_folders_that_cannot_be_opened_say_why(make_model, tmp_path):
    model = adapted(make_model(), LoRA(rank=2, targets=("q_proj",), base="gone/base"))
    save_adapter(model.adapter, learnt(model), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json here, so this is no adapter"):
        load_adapter(tmp_path / "elsewhere", model.config)
    with pytest.raises(FileNotFoundError, match="stands on 'gone/base', which is no model folder here"):
        load_pretrained(tmp_path)
    for change, said in (
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected one of LORA, BOTTLENECK, PREFIX_TUNING"),
        ({"bias": "all"}, "found bias 'all', expected 'none'"),
        ({"r": 3}, r"shape of model.layers.0.self_attn.q_proj.lora_A: found \(2, "),
        ({"trainable_token_indices": [3]}, "missing: model.embed_tokens.trainable_tokens_delta"),
        ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}, "trainable_token_indices that differ"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=said):
            load_adapter(tmp_path, model.config)
    config.write_text(json.dumps({key: value for key, value in settings.items() if key != "r"}))
    with pytest.raises(ValueError, match="the key 'r' is missing"):
        load_adapter(tmp_path, model.config)
    with pytest.raises(ValueError, match=r"bottleneck.*does not merge, so none can come after it"):
        bottleneck = adapted(make_model(), Bottleneck(size=3))
        save_pretrained(make_model(), tmp_path / "base")
        save_adapter(bottleneck.adapter, learnt(bottleneck), tmp_path / "b")
        load_pretrained(tmp_path / "base", adapters=[tmp_path / "b", tmp_path / "b"])


def test_an_adapter_is_not_opened_over_other_weights(make_model, tmp_path):
    """It knows those it was learnt on by their hash; what follows it, and what PEFT has made, does not."""
    base, other = make_model(), make_model(seed=1)
    save_pretrained(base, tmp_path / "base")
    save_pretrained(other, tmp_path / "other")
    known = weights_hash(lambda: base.state_dict().items())
    model = shake(adapted(base, LoRA(rank=2, base=str(tmp_path / "base"), base_hash=known)))
    save_adapter(model.adapter, learnt(model), tmp_path / "tuned")
    assert load_adapter(tmp_path / "tuned", base.config)[0] == model.adapter
    assert apart(load_pretrained(tmp_path / "tuned"), model) < 1e-5
    load_pretrained(tmp_path / "tuned", adapters=[tmp_path / "tuned"])
    told = rf"tuned was learnt on other weights than .*%s has: their hash is \w{{32}}, expected {known}\. Put back"
    with pytest.raises(ValueError, match=told % "other"):
        load_pretrained(tmp_path / "other", adapters=[tmp_path / "tuned"])
    save_pretrained(other, tmp_path / "base")  # trained anew
    for wrong in (load_pretrained, lambda folder: dict(folder_weights(folder))):
        with pytest.raises(ValueError, match=told % "base"):
            wrong(tmp_path / "tuned")
    object.__setattr__(model.adapter, "base_hash", "")
    save_adapter(model.adapter, learnt(model), tmp_path / "tuned")
    load_pretrained(tmp_path / "tuned")


# Prefixes ------------------------------------------------------------------------------------------------------


def prefixed(network: GPT, **settings: object) -> GPT:
    return shake(adapted(network, Prefix(length=3, **settings)))


def test_every_document_sees_the_prefix_as_if_it_were_alone(make_model):
    model = prefixed(make_model())
    lengths = [7, 1, 12, 10]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.arange(10, 40)[None]
    alone = torch.cat([model(part[None]) for part in ids[0].split(lengths)], 1)
    for layout in (None, Layout(ends, 12)):
        torch.testing.assert_close(model(ids, positions, layout=layout), alone, atol=1e-5, rtol=1e-5)
    assert (model(ids) - alone).abs().max() > 0.1  # as one document


def test_without_its_prefix_a_network_is_the_one_it_stands_on(make_model):
    base = make_model()
    model = prefixed(base)
    before = model(IDS)
    assert (before - base(IDS)).abs().max() > 0.1
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    with switched_off(model):
        assert torch.equal(model(IDS), base(IDS))
        assert generate(model, [[5, 6, 7]], **settings) == generate(base, [[5, 6, 7]], **settings)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [9], [30, 31, 8, 2, 1]]])
def test_answers_are_those_of_the_whole_forward_pass(make_model, prompts):
    model = prefixed(make_model())
    answers = generate(model, prompts, max_new_tokens=10, temperature=0.0)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = [*prompt]
        for _ in range(10):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert answer.ids == text[len(prompt) :]
    assert answers != generate(make_model(), prompts, max_new_tokens=10, temperature=0.0)


def test_a_prefix_comes_back_and_never_merges(make_model, tmp_path):
    base = make_model(n_kv_heads=1)
    save_pretrained(base, tmp_path / "base")
    for tokens, name in (((), "PREFIX_TUNING"), ((2, 8), "PREFIX_TUNING_AND_TOKENS")):
        model = prefixed(base, tokens=tokens, base=str(tmp_path / "base"))
        save_adapter(model.adapter, learnt(model), tmp_path / "tuned")
        assert json.loads((tmp_path / "tuned/adapter_config.json").read_text())["peft_type"] == name
        adapter, weights = load_adapter(tmp_path / "tuned", base.config)
        assert adapter == model.adapter and weights.keys() == learnt(model).keys()
        assert torch.equal(load_pretrained(tmp_path / "tuned")(IDS), model(IDS))
    with pytest.raises(ValueError, match="cannot be merged into them; a stage goes on with it by --adapter prefix"):
        dict(folder_weights(tmp_path / "tuned"))
    settings = json.loads((tmp_path / "tuned/adapter_config.json").read_text())
    (tmp_path / "tuned/adapter_config.json").write_text(json.dumps(settings | {"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.prefix: found \(3, 16\), expected \(4, 16\)"):
        load_adapter(tmp_path / "tuned", base.config)


def test_a_prefix_has_two_rows_a_place_and_layer(make_model):
    model = adapted(make_model(), Prefix(length=5))
    config = model.config
    assert model.num_parameters(learnt=True) == 5 * config.n_layers * 2 * config.n_kv_heads * config.head_dim


# Bottlenecks ----------------------------------------------------------------------------------------------------


def test_bottlenecks_are_those_of_an_independent_network(make_model, tmp_path):
    """transformers' Llama with the paper's layer hung behind its attention and feed-forward."""
    base = make_model()
    model = adapted(base, Bottleneck(size=5, tokens=(2, 8), base=str(tmp_path / "base")))
    assert torch.equal(model(IDS), base(IDS))
    shake(model)
    parts = learnt(model)
    save_pretrained(base, tmp_path / "base")
    save_adapter(model.adapter, parts, tmp_path / "tuned")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[[2, 8]] = parts["model.embed_tokens.trainable_tokens_delta"]

    def hang(path: str) -> None:
        down, down_bias, up, up_bias = (
            parts[f"{path}.adapter_{name}"] for name in ("down", "down_bias", "up", "up_bias")
        )

        def layer(module, inputs, h):
            inner = h @ down.T + down_bias
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            return h + inner @ up.T + up_bias

        theirs.get_submodule(path).register_forward_hook(layer)

    for i in range(base.config.n_layers):
        hang(f"model.layers.{i}.self_attn.o_proj")
        hang(f"model.layers.{i}.mlp.down_proj")
    with torch.no_grad():
        expected = theirs(IDS).logits
    opened = load_pretrained(tmp_path / "tuned")
    assert (base(IDS) - expected).abs().max() > 0.1
    for ours in (model, opened):
        torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=0)
    answer = generate(opened, [[5, 6, 7]], max_new_tokens=12, temperature=0.0)[0].ids
    assert answer == theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    assert generate(model, [[5, 6, 7], [9]], **settings) == generate(opened, [[5, 6, 7], [9]], **settings)
    with pytest.raises(ValueError, match="cannot be merged into them; a stage goes on with it by --adapter bottleneck"):
        dict(folder_weights(tmp_path / "tuned"))


def test_a_bottleneck_has_the_paper_s_number_of_parameters(make_model):
    """2 m d + d + m for each of two a block."""
    model, d = adapted(make_model(), Bottleneck(size=5)), make_model().config.dim
    assert model.num_parameters(learnt=True) == 2 * model.config.n_layers * (2 * 5 * d + d + 5)
