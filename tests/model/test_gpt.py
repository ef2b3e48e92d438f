"""The network: sizes, documents that never see each other, and losses that are plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

import model.gpt
from model import GPT, GPTConfig
from model.config import default_ffn_dim, default_shape
from model.gpt import IGNORE, RMSNorm, Role, fresh_weights, normalized

DOCUMENTS = [[5, 9, 2, 40, 7], [3, 3, 8], [60, 1, 4, 4, 4, 12]]


def packed_row(documents: list[list[int]], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions, (1, tokens); pads are token 0 at position 0."""
    ids = [token for document in documents for token in document] + [0] * padding
    positions = [i for document in documents for i in range(len(document))] + [0] * padding
    return torch.tensor([ids]), torch.tensor([positions])


@pytest.mark.parametrize(("dim", "n_layers", "millions"), [(512, 8, 25.830), (768, 16, 104.031)])
def test_parameters_of_the_published_sizes(dim, n_layers, millions):
    with torch.device("meta"):
        network = GPT(GPTConfig(dim=dim, n_layers=n_layers))
    assert round(network.num_parameters() / 1e6, 3) == millions


@pytest.mark.parametrize(("dim", "width"), [(64, 192), (512, 1408), (640, 1728), (768, 2048), (1024, 2752)])
def test_ffn_width_is_8_thirds_of_dim_rounded_up_to_64(dim, width):
    assert default_ffn_dim(dim) == GPTConfig(dim=dim).ffn_dim == width


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "shared"),
    [
        (64, 4, 2, 1),
        (128, 4, 4, 1),
        (256, 4, 8, 2),
        (512, 8, 8, 2),
        (768, 12, 8, 2),
        (1024, 16, 8, 2),
        (4096, 40, 32, 8),
    ],
)
def test_a_width_alone_tells_layers_and_heads(dim, layers, heads, shared):
    shape = default_shape(dim)
    assert shape == {"n_layers": layers, "n_heads": heads, "n_kv_heads": shared}
    assert 32 <= GPTConfig(dim=dim, **shape).head_dim <= 128


def test_every_even_width_has_a_shape():
    for dim in range(2, 400, 2):
        assert GPTConfig(dim=dim, **default_shape(dim)).head_dim % 2 == 0
        assert default_shape(dim, n_heads=6)["n_heads"] == 6 and default_shape(dim, n_heads=6)["n_kv_heads"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "n_heads 6 is not a multiple of n_kv_heads 4; n_kv_heads may be 1, 2, 3, 6"),
        ({"dim": 100, "n_heads": 8}, "dim 100 is not a multiple of n_heads 8; take dim 96 or 112, or"),
        ({"dim": 24, "n_heads": 8}, "head_dim 3 is odd.*; take dim 16 or 32, or another n_heads"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_the_matrices_that_are_multiplied(tied):
    config = GPTConfig(vocab_size=300, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, tie_embeddings=tied)
    matrices = [p for name, p in GPT(config).named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    matmul = sum(p.numel() for p in matrices) + (300 * 32 if tied else 0)
    assert config.flops_per_token(128) == 6 * matmul + 12 * 3 * 4 * 16 * 128


def test_initial_weights_are_small_and_smaller_into_the_residual_stream():
    torch.manual_seed(0)
    network = GPT(GPTConfig(vocab_size=500, dim=64, n_layers=8))
    block = network.model.layers[0]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)  # sqrt(2 * 8) = 4
    assert torch.equal(block.input_layernorm.weight, torch.ones(64))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_documents_in_a_row_give_the_logits_they_give_alone(make_model, qk_norm):
    network = make_model(qk_norm=qk_norm)
    ids, positions = packed_row(DOCUMENTS, padding=3)
    packed = network(ids, positions)[0]
    alone = torch.cat([network(torch.tensor([document]))[0] for document in DOCUMENTS])
    torch.testing.assert_close(packed[: len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_cpus_has_the_gradient_of_the_formula(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x, follows = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True), torch.randn(3, 5, 24)
    plain = norm.weight * normalized(x, norm.eps)[0]
    fast = norm(x)
    assert fast.dtype == plain.dtype == torch.float32 and torch.equal(fast, plain)
    expected, found = (torch.autograd.grad((out * follows).sum(), [x, norm.weight]) for out in (plain, fast))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(found, expected, **near)


def test_attention_looks_neither_ahead_nor_into_other_documents(make_model):
    network = make_model()
    ids, positions = packed_row(DOCUMENTS)
    changed = ids.clone()
    changed[0, 6] = 77  # the middle token of the second document, at places 5..8
    differs = (network(ids, positions) != network(changed, positions)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [6, 7]


def test_padding_changes_no_loss_and_no_gradient(make_model):
    network = make_model()
    results = []
    for padding in (0, 5):
        network.zero_grad()
        ids, positions = packed_row(DOCUMENTS, padding)
        labels = torch.where(torch.arange(ids.shape[1]) < 13, ids.roll(-1), IGNORE)
        loss = network(ids, positions, labels).sum()
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_in_chunks_are_plain_cross_entropy(make_model, monkeypatch, tied):
    network = make_model(tie_embeddings=tied)
    ids = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, 3:6] = IGNORE
    plain = F.cross_entropy(network(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    weights = torch.rand(3, 11)  # a gradient that differs from token to token
    expected = torch.autograd.grad((plain.view(3, 11) * weights).sum(), list(network.parameters()))
    monkeypatch.setitem(model.gpt.LOSS_BYTES, "cpu", 4 * 97 * 7)  # 30 labels: four whole chunks and a rest
    monkeypatch.setattr(model.gpt, "LOSS_TOKENS", 1)
    losses = network(ids, labels=labels)
    found = torch.autograd.grad((losses * weights).sum(), list(network.parameters()))
    torch.testing.assert_close(losses.flatten(), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ignored_labels_give_no_loss_and_no_gradient(make_model):
    network = make_model()
    losses = network(torch.tensor([[4, 5, 6]]), labels=torch.full((1, 3), IGNORE))
    assert losses.tolist() == [[0.0, 0.0, 0.0]] and losses.dtype == torch.float32
    losses.sum().backward()
    assert all(not p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_activations_give_the_same_gradient(make_model, dropout):
    network = make_model(dropout=dropout).train()
    ids, positions = packed_row(DOCUMENTS)
    gradients = []
    for recompute in (False, True):
        network.recompute_activations(recompute)
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(network(ids, positions, ids).sum(), list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_in_training_alone(make_model):
    network = make_model(dropout=0.5)
    ids = torch.tensor([DOCUMENTS[0]])
    assert torch.equal(network(ids), make_model()(ids))
    assert not torch.allclose(network.train()(ids), make_model()(ids))


# What parameters are for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_parameter_has_a_role(make_model, tied, qk_norm):
    network = make_model(n_layers=1, tie_embeddings=tied, qk_norm=qk_norm)
    layer = "model.layers.0"
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if qk_norm else []
    expected = {f"{layer}.{name}.weight": Role.HIDDEN for name in matrices}
    expected |= {f"{layer}.{name}.weight": Role.NORM for name in norms}
    expected |= {"model.embed_tokens.weight": Role.EMBEDDING, "model.norm.weight": Role.NORM}
    expected |= {} if tied else {"lm_head.weight": Role.HEAD}
    assert network.roles() == expected
    assert network.roles().keys() == dict(network.named_parameters()).keys()


def test_roles_need_no_memory_and_no_shape(make_model):
    with torch.device("meta"):
        hollow = GPT(make_model(tie_embeddings=False).config)
    assert hollow.roles() == make_model(tie_embeddings=False).roles()
    for parameter in hollow.parameters():
        parameter.data = torch.empty(parameter.numel(), device="meta")  # as a sharded model may hold it
    assert hollow.roles() == make_model(tie_embeddings=False).roles()


def test_what_is_none_of_ours_has_the_role_other(make_model):
    network = make_model()
    known = network.roles()
    network.scale = torch.nn.Parameter(torch.ones(3, 3))
    network.model.extra = torch.nn.LayerNorm(32)
    network.model.layers[1].mlp.gate = torch.nn.Conv1d(32, 4, 3)
    others = ["scale", "model.extra.weight", "model.extra.bias"]
    others += ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.bias"]
    assert network.roles() == known | dict.fromkeys(others, Role.OTHER)


@pytest.mark.parametrize(
    ("role", "decays", "orthogonal"),
    [
        (Role.HIDDEN, True, True),
        (Role.HEAD, True, False),
        (Role.EMBEDDING, False, False),
        (Role.NORM, False, False),
        (Role.OTHER, False, False),
    ],
)
def test_decay_and_muon_follow_from_the_role(role, decays, orthogonal):
    assert (role.decays, role.orthogonal) == (decays, orthogonal)


def test_the_blocks_are_the_layers_in_order(make_model):
    network = make_model(n_layers=3)
    blocks = network.blocks()
    assert [block.self_attn.layer for block in blocks] == [0, 1, 2]
    assert all(block is layer for block, layer in zip(blocks, network.model.layers, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_weights_are_every_parameter_made_as_the_model_makes_it(tied):
    config = GPTConfig(vocab_size=500, dim=64, n_layers=8, qk_norm=True, tie_embeddings=tied)
    weights = dict(fresh_weights(config, seed=3))
    torch.manual_seed(3)  # the generator of a whole model is the global one
    network = GPT(config)
    assert {name: w.shape for name, w in weights.items()} == {n: p.shape for n, p in network.named_parameters()}
    assert all(torch.equal(again, weights[name]) for name, again in fresh_weights(config, seed=3))
    for name, parameter in network.named_parameters():
        assert weights[name].std(correction=0).item() == pytest.approx(parameter.std(correction=0).item(), rel=0.1)
        assert weights[name].mean().item() == pytest.approx(parameter.mean().item(), abs=0.002)
