"""Attention: which tokens see which, and the kernel that computes it.

Every kernel takes (rows, sequence, heads, head_dim), the keys and values of fewer heads, and gives the same shape back:

    CPU              `attend_in_blocks`: blocks of queries, each with the keys before it, many documents at once
    CUDA, 16 bits    `attend_varlen`: FlashAttention over documents of any length
    elsewhere        the plain formula under the mask of `visible`, to which the two above are held by tests

A mask over a row computes what it hides: for documents of 150 tokens in rows of 512, two thirds of it. The two fast
ways are told by a `Layout` where documents lie, so they leave that out.

A prefix (model/adapters.py) is keys and values of so many places that every sequence sees before its own. Its keys are
learnt as they are, and are not turned; the tokens' positions begin behind it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model.config import GPTConfig

# torch 2.12 lets queries share keys in the kernel; before, every query head is given its own copy
VARLEN_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
varlen: Callable[..., Any] = partial(varlen_attn, window_size=(-1, 0))  # all before, nothing after
varlen = partial(varlen, enable_gqa=True) if VARLEN_GQA else varlen
# documents of about this many tokens or more fill blocks of 64 queries; for shorter ones these would be half empty
LONG = 256


@dataclass
class Layout:
    """Where the documents of a batch lie: sequences of places, each seeing itself up to where it is.

    A place is a token's index in the rows laid end to end. A document is one sequence. Where answers share a prompt,
    each is a sequence with the prompt before it; a place then stands in several sequences and belongs to the first.
    """

    cu_seqlens: Tensor  # int32 (sequences + 1,): cumulative lengths; the last may repeat, for sequences of no token
    longest: int  # no sequence has more tokens
    places: Tensor | None = None  # int64 (tokens,) of all sequences; None: they fill the rows, one after another
    tokens: Tensor | None = None  # int64 (rows * sequence,): which of those tokens belongs to a place


@dataclass
class Joined:
    """The keys of a layout whose sequences each begin with a prefix."""

    cu_seqlens: Tensor  # int32 (sequences + 1,)
    longest: int
    index: Tensor  # int64 (keys,): which row each is, of the prefix's and then all tokens'


def visible(position_ids: Tensor) -> Tensor:
    """What each place sees, from positions alone: (rows, sequence) -> bool (rows, 1, queries, keys).

    A document starts wherever the position is 0. Where positions jump back without reaching 0, a branch starts: it sees
    the document's first run up to the position before its own first one, and itself.

        positions    0  1  2  3  4 | 2  3 | 0  1        prompt and first answer, second answer, next document
    """
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    document = (position_ids == 0).cumsum(-1)
    begins = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    begun = torch.where(begins, place, 0).cummax(-1).values  # where the run of each place began
    start = position_ids - (place - begun)  # and at which position
    # queries down, keys across
    same_document = document[:, :, None] == document[:, None, :]
    same_run = begun[:, :, None] == begun[:, None, :]
    shared = position_ids[:, None, :] < start[:, :, None]
    causal = place[:, None] >= place
    return (same_document & causal & (same_run | shared))[:, None]


@dataclass
class Context:
    """What attention needs beside queries, keys and values; made once a forward pass, the same for all layers."""

    cos: Tensor  # float32 (rows, sequence, 1, head_dim / 2), of every position's angles
    sin: Tensor
    dropout: float = 0.0
    mask: Tensor | None = None  # bool (rows, 1, queries, prefix's keys and keys)
    layout: Layout | None = None  # for the kernel of any length
    joined: Joined | None = None  # beside it, where there is a prefix
    blocks: "Blocks | None" = None  # for the one in blocks
    prefix: int = 0  # places that every sequence sees before its own


Before = tuple[Tensor, Tensor]  # a prefix's keys and values, each (places, kv_heads, head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context, prefix: Tensor | None = None) -> Tensor:
    """Queries and keys turned by their positions, then softmax(q k^T / sqrt(head_dim)) v over what each place sees.

    prefix: (places, 2 * kv_heads * head_dim), keys beside values; looked at where the context says so.
    """
    before = None if prefix is None or not context.prefix else split_prefix(prefix.to(k.dtype), k.shape[3])
    if context.blocks is not None:
        return attend_in_blocks(q, k, v, context, context.blocks, before)
    q, k = (apply_rotary(x, context.cos, context.sin) for x in (q, k))
    if context.layout is not None:
        return attend_varlen(q, k, v, context.layout, context.joined, before)
    return attend_masked(q, k, v, context.mask, context.dropout, before)


def split_prefix(prefix: Tensor, head_dim: int) -> Before:
    keys, values = prefix.unflatten(1, (2, -1, head_dim)).unbind(1)
    return keys, values


def prepare(
    ids: Tensor,
    position_ids: Tensor | None,
    layout: Layout | None,
    shape: GPTConfig,
    dtype: torch.dtype,
    dropout: float,
    prefix: int = 0,
) -> Context:
    """The way to take for a batch. Without a layout it is the mask of `visible`; without positions every row is one
    document. dtype: of queries and keys; prefix: places that every document sees before its own."""
    whole = position_ids is None
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
    made = partial(Context, *rotary(position_ids + prefix, shape), prefix=prefix)
    if whole and not prefix:
        return made(dropout)
    if layout is not None and has_varlen(ids.device, dtype, dropout):
        return made(layout=layout, joined=join(layout, prefix, ids.numel()) if prefix else None)
    if layout is not None and ids.device.type == "cpu":
        return made(dropout, blocks=plan_blocks(layout, shape.n_heads, shape.n_kv_heads, prefix))
    return made(dropout, F.pad(visible(position_ids), (prefix, 0), value=True))


# Positions ------------------------------------------------------------------------------------------------------


def rope_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Angle a position turns each pair of channels by, radians: (head_dim / 2,)."""
    assert config.head_dim is not None
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return inv_freq / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        # Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * inv_freq / (2 * math.pi)  # whole turns within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * inv_freq + (1 - kept) * inv_freq / factor
    return inv_freq


def rotary(position_ids: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, float32, each (batch, sequence, 1, head_dim / 2)."""
    angles = position_ids[:, :, None, None].float() * rope_frequencies(config, position_ids.device)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (batch, sequence, heads, head_dim); channel i is paired with i + head_dim / 2 (Hugging Face's layout)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# The plain formula ----------------------------------------------------------------------------------------------


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, before: Before | None = None
) -> Tensor:
    """The plain formula under a mask; without one, every place sees its row up to itself."""
    if before is not None:
        k, v = (torch.cat((x.expand(len(own), *x.shape), own), 1) for x, own in zip(before, (k, v), strict=True))
    if q.is_cuda:
        # shared keys together with a mask, or in float32, would be the slow kernel of the last resort there
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        dropout_p=dropout, enable_gqa=k.shape[2] != q.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


# CUDA -----------------------------------------------------------------------------------------------------------


def has_varlen(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """Whether FlashAttention runs here: 16 bits, compute capability 8.0 or more, no dropout."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, joined: Joined | None = None, before: Before | None = None
) -> Tensor:
    """FlashAttention over sequences of any length (Dao 2023, arXiv:2307.08691); shapes do not depend on lengths. Where
    there are more keys than queries, the last of either stand at one place, so that all see a prefix."""
    shape, seen = q.shape, joined or layout
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if layout.places is not None:
        q, k, v = (x.index_select(0, layout.places) for x in (q, k, v))
    if before is not None and joined is not None:
        k, v = (torch.cat(both).index_select(0, joined.index) for both in zip(before, (k, v), strict=True))
    if not VARLEN_GQA:
        k, v = (x.repeat_interleave(shape[2] // x.shape[1], 1) for x in (k, v))
    out = varlen(q, k, v, layout.cu_seqlens, seen.cu_seqlens, layout.longest, seen.longest)
    return (out if layout.tokens is None else out.index_select(0, layout.tokens)).view(shape)


def join(layout: Layout, prefix: int, places: int) -> Joined:
    """A prefix of so many places before every sequence. places: rows * sequence. The host waits for nothing."""
    cu, tokens = layout.cu_seqlens, places if layout.places is None else len(layout.places)
    sequences = len(cu) - 1
    joined = cu + prefix * torch.arange(sequences + 1, device=cu.device)
    key = torch.arange(tokens + prefix * sequences, device=cu.device)
    # behind the last sequence there may be tokens of none
    sequence = torch.searchsorted(joined[1:], key, right=True).clamp(max=sequences - 1)
    within = key - joined[sequence]
    index = torch.where(within < prefix, within, within + cu[sequence])  # prefix + a token's number
    return Joined(joined.int(), layout.longest + prefix, index)


# CPU ------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """All blocks of queries in a batch that see equally many keys: one matrix product."""

    count: int  # blocks times heads of keys
    bias: Tensor  # float32 (1, queries, keys) of a block: minus infinity where a key comes after its query


@dataclass
class Blocks:
    """A plan of attention in blocks, made once a forward pass and followed by all layers.

    Queries, keys and values are gathered from tables that have a row for every head of keys and place, head by head
    (and behind those likewise for the places of a prefix); the queries that share a key stand in one row.
    """

    groups: list[Group]
    queries: Tensor  # int64: rows of all groups' queries
    keys: Tensor  # int64: rows of all groups' keys and values
    results: Tensor  # int64 (places * kv_heads,): which result belongs to a place and head


def plan_blocks(layout: Layout, heads: int, kv_heads: int, prefix: int = 0) -> Blocks:
    """Cut sequences into blocks of queries; those that see equally many blocks of keys are computed together.

    What comes after a query in its own block is hidden by the bias, the same for all blocks. So is what lies behind the
    end of a sequence, where its last token stands once more. A prefix is so many more keys before the others.
    """
    starts, lengths = layout.cu_seqlens[:-1].long(), layout.cu_seqlens.diff().long()
    lasts, total = starts + lengths - 1, int(lengths.sum())
    size = 64 if int(lengths.square().sum()) > LONG * total else 32
    places = torch.arange(total) if layout.places is None else layout.places[:total]
    belongs = torch.arange(total) if layout.tokens is None else layout.tokens
    # a prompt's blocks are left out where they belong to another sequence
    owned = F.pad(torch.zeros(total, dtype=torch.long).index_fill_(0, belongs, 1).cumsum(0), (1, 0))
    head = torch.arange(kv_heads)[:, None, None] * len(belongs)  # where its rows begin in the tables
    before = (kv_heads * len(belongs) + torch.arange(kv_heads * prefix)).view(kv_heads, 1, prefix)
    result, stride = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.long)
    groups: list[Group] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    done = 0
    for first in range(0, int(lengths.max()), size):
        ends = torch.minimum(starts + first + size, lasts + 1)
        wanted = owned[ends] > owned[torch.minimum(starts + first, ends)]
        steps = torch.arange(first + size)
        seen = torch.minimum(starts[wanted, None] + steps, lasts[wanted, None])  # tokens, (blocks, keys)
        asked = seen[:, first:].flatten()
        real = (starts[wanted, None] + steps <= lasts[wanted, None])[:, first:].flatten()
        result[asked[real]] = done + torch.arange(len(asked))[real]
        stride[asked[real]] = len(asked)
        done += kv_heads * len(asked)
        groups.append(Group(kv_heads * len(seen), causal_bias(size, prefix + first, heads // kv_heads)))
        queries.append((head + places[seen[:, first:]]).flatten())
        keys.append(torch.cat((before.expand(-1, len(seen), -1), head + places[seen]), 2).flatten())
    results = result[belongs, None] + stride[belongs, None] * torch.arange(kv_heads)
    return Blocks(groups, torch.cat(queries), torch.cat(keys), results.flatten())


def causal_bias(size: int, first: int, shared: int) -> Tensor:
    """For `size` queries after `first` keys, each query `shared` times: float32 (1, size * shared, first + size)."""
    later = torch.ones(size, first + size, dtype=torch.bool).triu(first + 1)
    return torch.zeros(size, first + size).masked_fill(later, -torch.inf).repeat_interleave(shared, 0)[None]


@torch.compiler.disable  # shapes follow the documents: nothing to gain from a graph for each
def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, context: Context, blocks: Blocks, before: Before | None = None
) -> Tensor:
    """Exact attention at the cost of what is seen, in float32 whatever comes in."""
    kv_heads, width = k.shape[2:]
    cos, sin = context.cos.flatten(0, 1), context.sin.flatten(0, 1)

    def table(x: Tensor, turned: bool, scale: float = 1.0) -> Tensor:
        """A row for every head of keys and place, turned on the way."""
        x = x.flatten(0, 1).unflatten(1, (kv_heads, -1)).transpose(0, 1).float()
        x = apply_rotary(x, cos * scale, sin * scale) if turned else x
        return x.reshape(-1, x.shape[2] * width)

    counts = [(group.count, *group.bias.shape[1:]) for group in blocks.groups]
    shared = q.shape[2] // kv_heads
    rows = [table(k, turned=True), table(v, turned=False)]
    if before is not None:
        rows = [torch.cat((own, x.transpose(0, 1).flatten(0, 1).float())) for own, x in zip(rows, before, strict=True)]
    seen = [each.index_select(0, blocks.keys).split([n * keys for n, _, keys in counts]) for each in rows]
    asked = table(q, turned=True, scale=width**-0.5).index_select(0, blocks.queries)
    asked = asked.split([n * queries // shared for n, queries, _ in counts])
    results = []
    for (count, queries, keys), group, qs, ks, vs in zip(counts, blocks.groups, asked, *seen, strict=True):
        scores = torch.baddbmm(group.bias, qs.view(count, queries, width), ks.view(count, keys, width).transpose(1, 2))
        probabilities = F.dropout(scores.softmax(-1), context.dropout)
        results.append(torch.bmm(probabilities, vs.view(count, keys, width)).view(-1, shared * width))
    return torch.cat(results).index_select(0, blocks.results).view(q.shape).to(q.dtype)
