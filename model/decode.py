"""Tokens in, next token's logits out, without computing anything twice: the network over a key-value cache.

    decoder = CachedGPT(model, rows=16, capacity=64)
    decoder.add([[1, 71, 905], [1, 88]])   (2, vocabulary): what follows each prompt; they have the first two rows
    decoder.step(ids)                      (2, vocabulary): what follows each prompt and its ids, a new token a row
    decoder.keep([1])                      from here on the batch is its second row alone
    decoder.repeat(8)                      each row read so far stands in eight rows from here on

It reads the weights of a `GPT` when it is made, and computes what `GPT.forward` would for the whole sequences; that
forward pass is its plain twin. What is different, and why:

- A token's place in the cache is its position, whatever the lengths of the prompts, so nothing is padded: prompts go
  through the matrices end to end, and only attention sees them side by side. A prefix has the first places of all rows.
- The cache is allocated once and written in place. On a GPU all shapes stay the same from step to step, so that a step
  is recorded once as a CUDA graph and replayed.
- The rows in use are the first ones, so that attention sees the cache as it lies. Which sequence is where is changed
  by copying (`keep`, `swap`), once for each that comes or goes (model/slots.py).
- Queries that share a key are given to attention as if they were a sequence, so that keys are never expanded.
- On a CPU, oneDNN's linear layer reads a matrix about twice as fast as `F.linear`, which asks BLAS. For a batch the
  matrices are laid out for it first. A batch's attention is two small products there, over a cache in float32
  whatever the weights are: the kernels made for long sequences take longer over one token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.adapters import behind, effective_weight
from model.attention import apply_rotary, rotary, split_prefix
from model.gpt import GPT, Block

# not cuDNN's attention: it makes a plan for every shape it meets
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WINDOW = 64  # on a CPU, attention reads the cache up to a multiple of this: few shapes, little in vain


class Matrices(NamedTuple):
    """A block's weights, each (out, in), as `linear` takes them."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class CachedGPT:
    """A batch of sequences that grow by one token a row and step.

    Args:
        model: its weights are read now; changes made later may or may not be seen. Dropout is never applied.
        rows: most sequences at a time.
        capacity: most tokens a row may have; one that is full goes on, overwriting its last token.
        static: whether shapes stay the same from step to step. None: on a GPU.
    """

    def __init__(self, model: GPT, rows: int, capacity: int, static: bool | None = None) -> None:
        config, head = model.config, model.head_weight
        assert config.head_dim is not None
        self.model, self.head_dim = model, config.head_dim
        self.prefix = model.model.prefix_length  # places taken before a row's first token
        self.capacity = capacity = self.prefix + capacity
        self.device, self.dtype = head.device, head.dtype
        self.static = self.device.type == "cuda" if static is None else static
        onednn = onednn_fits(head)
        # one row of float32 gains too little from another layout to pay for the copies
        self.packed = packed = onednn and (rows > 1 or self.dtype != torch.float32)
        self.linear: Callable[[Tensor, Tensor], Tensor] = (
            onednn_linear_alike if packed and rows > 1 else onednn_linear if onednn else F.linear
        )
        with torch.inference_mode():
            self.blocks = cast(list[Block], model.blocks())
            self.matrices = [matrices(block, rows if packed else 0) for block in self.blocks]
            self.head = laid_out(head, rows) if packed else head
            self.embedding = effective_weight(model.model.embed_tokens)
            places = torch.arange(capacity, device=self.device)[None]
            self.cos, self.sin = (table[0, :, 0].to(self.dtype) for table in rotary(places, config))
            # a layer's keys, then its values
            shape = (config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim)
            narrow = self.device.type == "cpu" and self.dtype.itemsize < 4
            self.cache_dtype = torch.float32 if narrow else self.dtype
            self.cache = torch.zeros(shape, device=self.device, dtype=self.cache_dtype)
            for layer, block in zip(self.cache, self.blocks, strict=True):
                if self.prefix and block.self_attn.prefix is not None:
                    before = torch.stack(split_prefix(block.self_attn.prefix, config.head_dim))
                    layer[:, :, :, : self.prefix] = before.transpose(1, 2)[:, None]
        self.lengths: list[int] = []  # places taken in the cache, of every row in use
        self.set_rows()

    def set_rows(self) -> None:
        """What a step reads and writes, for the rows there are."""
        with torch.inference_mode():
            self.positions = torch.tensor(self.lengths, device=self.device)  # of the tokens that come next
            self.ids = torch.zeros_like(self.positions)
            # the first place of each row's heads in a layer's cache, keys' and then values', (rows, 2 * kv_heads)
            _, sides, most, kv_heads, _, _ = self.cache.shape
            heads = torch.arange(sides * most * kv_heads, device=self.device).view(sides, most, kv_heads)
            self.first = heads[:, : len(self.lengths)].transpose(0, 1).flatten(1) * self.capacity
        self.logits = torch.empty(0)
        self.replay: Callable[[], None] | None = None

    def add(self, texts: Sequence[Sequence[int]], held: Sequence[int] | None = None) -> Tensor:
        """Let sequences take the next rows: logits of what follows each, (texts, vocabulary).

        texts: token ids to read, at least one each. held: how many tokens stand before each in its row's cache already.
        """
        with torch.inference_mode(), sdpa_kernel(BACKENDS):
            first, width = len(self.lengths), max(map(len, texts))
            begin = [self.prefix + n for n in held or [0] * len(texts)]
            ends = [start + len(text) for start, text in zip(begin, texts, strict=True)]
            lengths, starts = torch.tensor([list(map(len, texts)), begin], device=self.device)
            last, tokens = lengths.cumsum(0) - 1, sum(map(len, texts))
            # the very last one may come several times: it says the same again, and few shapes are met
            each = torch.arange(few_shapes(tokens) if self.packed else tokens, device=self.device).clamp_(
                max=tokens - 1
            )
            ids = torch.tensor([token for text in texts for token in text], device=self.device)[each]
            rows = torch.repeat_interleave(torch.arange(len(texts), device=self.device), lengths)[each]
            places = each - (last + 1 - lengths)[rows]  # in its text
            positions = places + starts[rows]
            seen = None  # of the places before a text, and in it
            if any(begin):
                within = torch.arange(width, device=self.device)[:, None]
                seen = torch.arange(max(ends), device=self.device) <= starts[:, None, None, None] + within

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys, values = self.cache[layer, :, first : first + len(texts)]
                keys[rows, :, positions] = k.to(self.cache_dtype)
                values[rows, :, positions] = v.to(self.cache_dtype)
                beside = keys.new_zeros(len(texts), width, *q.shape[1:])  # padded on the right, never looked at
                beside[rows, places] = q.to(self.cache_dtype)
                out = F.scaled_dot_product_attention(
                    beside.transpose(1, 2), keys[:, :, : max(ends)], values[:, :, : max(ends)],
                    attn_mask=seen, is_causal=seen is None, enable_gqa=True,
                )  # fmt: skip
                return out.transpose(1, 2)[rows, places].to(self.dtype)

            logits = self.linear(self.hidden(ids, positions, attend)[last], self.head)
        self.lengths += ends
        self.set_rows()
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Take in one token a row, (rows,): logits of what follows, (rows, vocabulary), valid until the next step."""
        with torch.inference_mode(), sdpa_kernel(BACKENDS):
            self.ids.copy_(ids)
            if self.replay is None:
                self.replay = recorded(self.forward) if self.static and self.device.type == "cuda" else self.forward
            self.replay()
            self.positions.add_(1).clamp_(max=self.capacity - 1)
        self.lengths = [min(length + 1, self.capacity) for length in self.lengths]
        return self.logits

    def forward(self) -> None:
        """`ids` at `positions` -> `logits`. It may be run again: the same places of the cache are written."""
        rows, used = len(self.lengths), max(self.lengths) + 1
        window = self.capacity if self.static else min(self.capacity, -(-used // WINDOW) * WINDOW)
        unseen = torch.arange(window, device=self.device) > self.positions[:, None]
        mask = torch.zeros(rows, window, device=self.device, dtype=self.cache_dtype).masked_fill_(unseen, -torch.inf)
        kv_heads = self.cache.shape[3]
        mask = mask[:, None, None].repeat(1, kv_heads, 1, 1)
        places = (self.first + self.positions[:, None]).flatten()  # of the new keys and values

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            new = torch.cat((k, v), 1).view(-1, self.head_dim).to(self.cache_dtype)
            self.cache[layer].view(-1, self.head_dim).index_copy_(0, places, new)
            keys, values = self.cache[layer, :, :rows, :, :window]
            q = q.reshape(rows, kv_heads, -1, self.head_dim)  # heads that share a key stand together
            return attend_once(q.to(self.cache_dtype), keys, values, mask).to(self.dtype)

        self.logits = self.linear(self.hidden(self.ids, self.positions, attend), self.head)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Final hidden states (tokens, dim) of tokens (tokens,). `attend` takes a layer and its q, k, v, each
        (tokens, heads, head_dim), and gives each token's (tokens, ...) of as many numbers as q."""
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        x = F.embedding(ids, self.embedding)
        for layer, (block, weights) in enumerate(zip(self.blocks, self.matrices, strict=True)):
            qkv = self.linear(block.input_layernorm(x), weights.qkv).view(len(ids), -1, self.head_dim)
            kv_heads = self.cache.shape[3]
            qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
            if block.self_attn.qk_norm:
                q, k = block.self_attn.q_norm(qk[:, :-kv_heads]), block.self_attn.k_norm(qk[:, -kv_heads:])
                qk = torch.cat((q, k), 1)
            qk = apply_rotary(qk, cos, sin)
            out = attend(layer, qk[:, :-kv_heads], qk[:, -kv_heads:], v)
            x = x + behind(block.self_attn.o_proj, self.linear(out.reshape(len(ids), -1), weights.o))
            gate, up = self.linear(block.post_attention_layernorm(x), weights.gate_up).chunk(2, -1)
            x = x + behind(block.mlp.down_proj, self.linear(F.silu(gate).mul_(up), weights.down))
        return self.model.model.norm(x)

    def repeat(self, copies: int) -> None:
        """Let every row stand in `copies` rows, one after another; logits of the prompts are as they were."""
        rows, used = len(self.lengths), max(self.lengths)
        with torch.inference_mode():
            read = self.cache[:, :, :rows, :, :used].repeat_interleave(copies, 2)
            self.cache[:, :, : rows * copies, :, :used] = read
        self.lengths = [length for length in self.lengths for _ in range(copies)]
        self.set_rows()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; `rows` ascend."""
        used = max(self.lengths[row] for row in rows)
        with torch.inference_mode():
            for new, old in enumerate(rows):
                if new != old:
                    self.cache[:, :, new, :, :used] = self.cache[:, :, old, :, :used]
        self.lengths = [self.lengths[row] for row in rows]
        self.set_rows()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let a row that is not in use hold the first tokens of another, in use or not."""
        used = self.prefix + tokens
        with torch.inference_mode():
            self.cache[:, :, target, :, :used] = self.cache[:, :, source, :, :used]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first tokens of two rows' caches; who is in use is the caller's to know."""
        used = self.prefix + tokens
        with torch.inference_mode():
            both = self.cache[:, :, [one, other], :, :used]
            self.cache[:, :, one, :, :used], self.cache[:, :, other, :, :used] = both[:, :, 1], both[:, :, 0]

    def leave(self, row: int) -> None:
        """Let the last row in use be in use no more, after it has been swapped with `row`."""
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()
        self.set_rows()


def matrices(block: Block, rows: int) -> Matrices:
    """A block's weights: laid out for batches of so many rows, or (0) as they are."""
    attention, mlp = block.self_attn, block.mlp
    qkv = torch.cat([effective_weight(proj) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)])
    gate_up = torch.cat([effective_weight(proj) for proj in (mlp.gate_proj, mlp.up_proj)])
    found = (qkv, effective_weight(attention.o_proj), gate_up, effective_weight(mlp.down_proj))
    return Matrices(*(laid_out(weight, rows) if rows else weight for weight in found))


def onednn_fits(weight: Tensor) -> bool:
    """Whether torch was built with oneDNN, and it multiplies this type here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def laid_out(weight: Tensor, rows: int) -> Tensor:
    """A copy in the order in which oneDNN reads it fastest, for `onednn_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear by oneDNN. These are the operators that torch.compile's CPU backend uses."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def few_shapes(rows: int) -> int:
    """The next number of rows of which there are eight to a doubling. For every number of rows that a matrix is
    multiplied with oneDNN makes a program, and keeps it: half a megabyte each."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def onednn_linear_alike(x: Tensor, weight: Tensor) -> Tensor:
    """The same, and a row's numbers do not depend on how many others there are: for a single one oneDNN adds up in
    another order than for two or more, between which there is no difference (a test holds this)."""
    return onednn_linear(x.repeat(2, 1), weight)[:1] if len(x) == 1 else onednn_linear(x, weight)


def attend_once(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One place a row looks back: q (rows, kv_heads, queries that share a key, head_dim), keys and values (rows,
    kv_heads, window, head_dim), mask (rows, kv_heads, 1, window) of 0 and -inf. Gives what is like q."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    # as one batch of rows and heads
    q_, keys_, values_, mask_ = (x.flatten(0, 1) for x in (q, keys, values, mask))
    shares = torch.baddbmm(mask_, q_, keys_.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
    # a window at a time: in what order one product adds up depends on its length, and so on the other rows'
    out = torch.bmm(shares[:, :, :WINDOW], values_[:, :WINDOW])
    for start in range(WINDOW, keys.shape[2], WINDOW):
        out.baddbmm_(shares[:, :, start : start + WINDOW], values_[:, start : start + WINDOW])
    return out.view_as(q)


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step as a CUDA graph, and give what replays it. It runs thrice here, so it must be repeatable."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries make their workspaces in the first runs, which cannot be recorded
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
