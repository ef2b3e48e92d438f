"""The network: sizes, documents that never see each other, and losses that are plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

import model.gpt
from model import GPT, GPTConfig
from model.config import default_ffn_dim
from model.gpt import IGNORE, KVCache

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
    ("changes", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "n_heads 6 is not a multiple of n_kv_heads 4"),
        ({"dim": 100, "n_heads": 8}, "dim 100 is not a multiple of n_heads 8"),
        ({"dim": 24, "n_heads": 8}, "head_dim 3 is odd"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


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
    monkeypatch.setitem(model.gpt.LOSS_CHUNK, "cpu", 7)  # 33 tokens: four whole chunks and a rest
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
        network.model.grad_checkpointing = recompute
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(network(ids, positions, ids).sum(), list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_in_training_alone(make_model):
    network = make_model(dropout=0.5)
    ids = torch.tensor([DOCUMENTS[0]])
    assert torch.equal(network(ids), make_model()(ids))
    assert not torch.allclose(network.train()(ids), make_model()(ids))


@pytest.mark.parametrize("pieces", [[14], [1] * 14, [5, 1, 8]])
def test_a_cache_changes_no_logit(make_model, pieces):
    network = make_model()
    ids, positions = packed_row(DOCUMENTS)
    cache = KVCache(network.config, 1, 14, torch.device("cpu"), torch.float32)
    parts = zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True)
    cached = torch.cat([network(part, places, cache=cache) for part, places in parts], 1)
    torch.testing.assert_close(cached, network(ids, positions), atol=1e-5, rtol=1e-5)


def test_a_cache_counts_positions_by_itself(make_model):
    network = make_model()
    ids = torch.tensor([DOCUMENTS[2]])
    cache = KVCache(network.config, 1, 6, torch.device("cpu"), torch.float32)
    cached = torch.cat([network(part, cache=cache) for part in ids.split(2, 1)], 1)
    torch.testing.assert_close(cached, network(ids), atol=1e-5, rtol=1e-5)
