"""Attention's fast ways against the plain formula: documents, branches, shared keys, dropout, every gradient."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.attention
from dataset.batch import PairBatch
from dataset.loader import PairRows
from model import GPTConfig
from model.adapters import Prefix, begun
from model.attention import Context, Layout, apply_rotary, attend, join, plan_blocks, rotary, visible
from model.folder import assemble
from model.gpt import summed_nll
from tests.conftest import encoded, spread_weights

WIDTH = 150  # places a row


def random_row(random: np.random.Generator, longest: int) -> tuple[list[int], list[list[int]]]:
    """Positions, and the sequences of places that see themselves: documents, some with a second branch behind them."""
    positions: list[int] = []
    sequences = []
    while (left := WIDTH - len(positions)) > 0:
        first, length = len(positions), min(left, int(random.integers(1, longest)))
        trunk = list(range(first, first + length))
        positions += range(length)
        sequences.append(trunk)
        left -= length
        if left and length > 1 and random.random() < 0.5:
            shared, more = int(random.integers(1, length)), min(left, int(random.integers(1, longest)))
            sequences.append([*trunk[:shared], *range(len(positions), len(positions) + more)])
            positions += range(shared, shared + more)
    return positions, sequences


def random_rows(rows: int, longest: int) -> tuple[torch.Tensor, Layout, list[list[int]]]:
    random = np.random.default_rng(longest)
    made = [random_row(random, longest) for _ in range(rows)]
    sequences = [[row * WIDTH + place for place in each] for row, (_, all_) in enumerate(made) for each in all_]
    places = [place for each in sequences for place in each]
    ends = np.cumsum([0, *map(len, sequences), 0, 0])  # two sequences of no token at the end
    tokens = [places.index(place) for place in range(rows * WIDTH)]
    layout = Layout(torch.tensor(ends).int(), WIDTH, torch.tensor(places), torch.tensor(tokens))
    return torch.tensor([positions for positions, _ in made]), layout, sequences


def queries_keys_values(rows: int, heads: int, kv_heads: int, dim: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, WIDTH, n, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


def learnt_prefix(places: int, kv_heads: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(places, 2 * kv_heads * dim, generator=torch.Generator().manual_seed(3)).requires_grad_()


def turns(positions: torch.Tensor, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary(positions, GPTConfig(dim=dim, n_heads=1, n_kv_heads=1, rope_theta=100.0))


def per_sequence(q, k, v, cu_queries, cu_keys, longest_query, longest_key, window_size, **shared):
    """What FlashAttention computes, one sequence after another; the last query sees the last key."""
    assert window_size == (-1, 0)
    for ends, longest in ((cu_queries, longest_query), (cu_keys, longest_key)):
        assert ends.dtype == torch.int32 and longest >= int(ends.diff().max())
    parts = []
    for asked, seen in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        one = [x[slice(*ends)].transpose(0, 1)[None] for x, ends in ((q, asked), (k, seen), (v, seen))]
        queries, keys = one[0].shape[2], one[1].shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        parts.append(F.scaled_dot_product_attention(*one, attn_mask=mask, **shared)[0].transpose(0, 1))
    return torch.cat(parts)


def test_what_is_visible_is_each_sequence_up_to_where_it_stands():
    positions, _, sequences = random_rows(3, 40)
    expected = torch.zeros(3 * WIDTH, 3 * WIDTH, dtype=torch.bool)
    for sequence in reversed(sequences):  # a place belongs to the first of several
        for i, place in enumerate(sequence):
            expected[place] = False
            expected[place, sequence[: i + 1]] = True
    found = visible(positions)
    assert all(found[i, 0].equal(expected[i * WIDTH :, i * WIDTH :][:WIDTH, :WIDTH]) for i in range(3))
    assert expected.sum() == found.sum()  # nothing is seen in another row


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("way", ["blocks", "varlen", "varlen without shared keys"])
@pytest.mark.parametrize(("longest", "heads", "kv_heads"), [(9, 4, 2), (40, 4, 4), (WIDTH, 6, 1)])
def test_fast_ways_are_the_plain_formula(monkeypatch, way, longest, heads, kv_heads, prefix):
    monkeypatch.setattr(model.attention, "LONG", 60)  # so that both sizes of blocks occur
    positions, layout, _ = random_rows(3, longest)
    if way == "blocks":
        context = Context(*turns(positions), blocks=plan_blocks(layout, heads, kv_heads, prefix), prefix=prefix)
    else:
        joined = join(layout, prefix, positions.numel())
        context = Context(*turns(positions), layout=layout, joined=joined, prefix=prefix)
        shared = {"enable_gqa": True} if way == "varlen" else {}
        monkeypatch.setattr(model.attention, "VARLEN_GQA", way == "varlen")
        kernel = lambda *tensors: per_sequence(*tensors, window_size=(-1, 0), **shared)  # noqa: E731
        monkeypatch.setattr(model.attention, "varlen", kernel)
    inputs = [*queries_keys_values(3, heads, kv_heads), learnt_prefix(prefix, kv_heads)]
    mask = F.pad(visible(positions), (prefix, 0), value=True)
    plain, fast = (
        attend(*inputs[:3], each, inputs[3]) for each in (Context(*turns(positions), mask=mask, prefix=prefix), context)
    )
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    follows = torch.randn_like(plain)
    inputs = inputs if prefix else inputs[:3]
    expected, found = (torch.autograd.grad(out, inputs, follows) for out in (plain, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_is_keys_and_values_before_every_sequence():
    """The plain way against a softmax written out, one sequence after another; its keys are not turned."""
    positions, _, sequences = random_rows(2, 40)
    q, k, v = queries_keys_values(2, 2, 1)
    prefix = learnt_prefix(3, 1)
    mask = F.pad(visible(positions), (3, 0), value=True)
    found = attend(q, k, v, Context(*turns(positions), mask=mask, prefix=3), prefix).flatten(0, 1)
    turned = [apply_rotary(x, *turns(positions)).flatten(0, 1) for x in (q, k)]
    expected = torch.empty_like(found)
    for sequence in reversed(sequences):  # a place belongs to the first of several
        for i, place in enumerate(sequence):
            keys = torch.cat((prefix[:, :8], turned[1][sequence[: i + 1], 0]))
            values = torch.cat((prefix[:, 8:], v.flatten(0, 1)[sequence[: i + 1], 0]))
            expected[place] = (turned[0][place] @ keys.T / 8**0.5).softmax(-1) @ values
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_both_sizes_of_blocks_are_chosen_by_the_length_of_documents():
    def sizes(length: int) -> set[int]:
        layout = Layout(torch.arange(0, 4 * length + 1, length).int(), length)
        return {group.bias.shape[1] for group in plan_blocks(layout, 1, 1).groups}

    assert (sizes(40), sizes(400)) == ({32}, {64})


def test_documents_fill_rows_where_nothing_is_shared():
    lengths = torch.tensor([70, 80, 33, 117])
    layout = Layout(F.pad(lengths.cumsum(0), (1, 0)).int(), WIDTH)
    positions = torch.cat([torch.arange(int(n)) for n in lengths]).view(2, WIDTH)
    inputs = queries_keys_values(2, 4, 2)
    found = attend(*inputs, Context(*turns(positions), blocks=plan_blocks(layout, 4, 2)))
    plain = attend(*inputs, Context(*turns(positions), mask=visible(positions)))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_dropout_drops_single_probabilities_and_makes_up_for_them():
    """With unit vectors as values the result is the probabilities themselves."""
    positions, layout, _ = random_rows(1, WIDTH)
    q, k, _ = queries_keys_values(1, 2, 1, dim=WIDTH)
    v = torch.eye(WIDTH).view(1, WIDTH, 1, WIDTH)
    angles = turns(positions, WIDTH)
    plain = attend(q, k, v, Context(*angles, mask=visible(positions))).detach()
    torch.manual_seed(2)
    dropped = attend(q, k, v, Context(*angles, 0.25, blocks=plan_blocks(layout, 2, 1))).detach()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75, atol=1e-5, rtol=1e-5)
    assert kept[plain > 1e-6].float().mean().item() == pytest.approx(0.75, abs=0.03)


# A prompt that two answers share --------------------------------------------------------------------------------


def pairs() -> tuple[PairBatch, dict[str, list]]:
    random = np.random.default_rng(5)
    token = lambda n: random.integers(5, 97, n).tolist()  # noqa: E731
    columns: dict[str, list] = {"chosen": [], "rejected": [], "prompt": []}
    for prompt_length, chosen, rejected in ((30, 20, 9), (1, 12, 3), (2, 1, 40), (17, 5, 5)):
        prompt = token(prompt_length)
        columns["chosen"].append(prompt + token(chosen))
        columns["rejected"].append(prompt + token(rejected))
        columns["prompt"].append(prompt_length)
    rows = PairRows(encoded(**columns), 64, 3)
    rows.reference = np.zeros((4, 2), dtype=np.float32)
    return rows.collate([*range(len(rows)), -1]), columns


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("fast", [True, False])
def test_answers_behind_one_prompt_have_the_likelihood_they_have_alone(make_model, fast, prefix):
    network = make_model()
    if prefix:
        adapter = Prefix(length=prefix)
        network = assemble(network.config, begun(network.state_dict().items(), adapter, 1), adapter=adapter)
        spread_weights(network)
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    batch, columns = pairs()
    layout = Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens) if fast else None
    nll = network(batch.input_ids, batch.position_ids, batch.labels, layout=layout)
    alone = []
    for i in batch.pair_ids:
        for side in ("chosen", "rejected"):
            ids, prompt = torch.tensor([columns[side][i]]), columns["prompt"][i]
            alone.append(F.cross_entropy(network(ids[:, :-1])[0, prompt - 1 :], ids[0, prompt:], reduction="sum"))
    found = torch.stack([nll[batch.segment == segment].sum() for segment in range(2 * batch.n_pairs)])
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, learnt) for loss in (found.sum(), sum(alone))]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_sum_of_losses_has_the_gradient_of_the_single_ones(make_model, monkeypatch):
    monkeypatch.setattr(model.gpt, "LOSS_TOKENS", 1)
    monkeypatch.setitem(model.gpt.LOSS_BYTES, "cpu", 4 * 97 * 7)  # several chunks and a rest
    network = make_model()
    batch, _ = pairs()
    ask = {"layout": Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens), "learnt": batch.learnt}
    single = network(batch.input_ids, batch.position_ids, batch.labels, **ask).sum()
    (summed,) = network(batch.input_ids, batch.position_ids, batch.labels, **ask, criterion=summed_nll)
    torch.testing.assert_close(summed, single, atol=1e-5, rtol=1e-6)
    gradients = [torch.autograd.grad(3 * loss, list(network.parameters())) for loss in (single, summed)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert network(batch.input_ids, batch.position_ids, batch.labels, **ask, criterion=summed_nll) == (summed,)
