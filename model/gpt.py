"""A decoder-only transformer of the Llama family: token ids in, logits or per-token losses out.

    ids       [[1, 71, 905, 2, 1, 88]]        two documents packed into one row
    positions [[0,  1,   2, 3, 0,  1]]        a document starts wherever the position is 0
    logits    (1, 6, 6400)

RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021, arXiv:2104.09864), grouped-query
attention (Ainslie et al. 2023, arXiv:2305.13245), SwiGLU (Shazeer 2020, arXiv:2002.05202), and optionally Qwen3's
RMSNorm on queries and keys. Parameters carry Hugging Face's names and rotary layout, so saving is no conversion.
The one tensor `position_ids` tells everything about packing: attention never looks across a position 0, which makes
padding (single-token documents of position 0) nothing special. Generation has a forward pass of its own (decode.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.adapters import MATRICES, SCORE, Adapter, body, effective_weight, install
from model.attention import Context, Layout, attend, prepare
from model.config import GPTConfig

IGNORE = -100  # a label that is not learnt
# memory for the logits that are held at a time: a CPU is fastest where its cache holds them (512 tokens of 6,400
# pieces), a GPU wants large products. They are of no fewer than LOSS_TOKENS tokens, however large the vocabulary is.
LOSS_BYTES = {"cpu": 13_107_200, "cuda": 1 << 28}
LOSS_TOKENS = 128


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 whatever x is."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return RMSNormOnCPU.apply(x, self.weight, self.eps)
        return self.weight * normalized(x, self.eps)[0]


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in the type of x, and 1 / rms(x) in float32, (..., 1)."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype), scale


class RMSNormOnCPU(torch.autograd.Function):
    """The same with half the passes over memory backwards, which is all its time on a CPU. A compiler does as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        normal, scale = normalized(x, eps)
        ctx.save_for_backward(normal, scale, weight)
        return weight * normal

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        normal, scale, weight = ctx.saved_tensors
        learnt = ctx.needs_input_grad[1]  # not beside an adapter
        grad_weight = (grad * normal).flatten(0, -2).sum(0, dtype=weight.dtype) if learnt else None
        grad = grad.float() * weight
        along = torch.linalg.vecdot(grad, normal.float()).unsqueeze(-1) / normal.shape[-1]
        return grad.addcmul_(normal, along, value=-1).mul_(scale).to(normal.dtype), grad_weight, None


class Attention(nn.Module):
    """Grouped-query attention: n_heads queries share n_kv_heads keys and values."""

    prefix: nn.Parameter | None  # (places, 2 * kv_heads * head_dim), an adapter's

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        assert config.head_dim is not None
        self.layer, self.head_dim = layer, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm
        self.register_parameter("prefix", None)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, sequence, _ = x.shape
        # the number of heads is read off the projections, so that a tensor-parallel slice of them works unchanged
        q, k, v = (proj(x).view(batch, sequence, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(q, k, v, context, self.prefix).reshape(batch, sequence, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.ffn_dim is not None
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids -> hidden states (batch, sequence, dim)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.grad_checkpointing = False
        self.prefix_length = 0  # places that every document sees before its own, and positions begin behind

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, layout: Layout | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        return self.norm(self.through(self.layers, x, self.context(x, input_ids, position_ids, layout)))

    def context(self, x: Tensor, ids: Tensor, position_ids: Tensor | None, layout: Layout | None) -> Context:
        """What the blocks that x goes through need beside it."""
        dropout = self.config.dropout if self.training else 0.0
        return prepare(ids, position_ids, layout, self.config, computed_in(x), dropout, self.prefix_length)

    def through(self, blocks: Iterable[nn.Module], x: Tensor, context: Context) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x


def computed_in(x: Tensor) -> torch.dtype:
    """The type of a product with x: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class GPT(nn.Module):
    """The whole network. Fresh weights come from torch's global generator: seed it for repeatable ones.

    With an adapter, its parameters alone are learnt; they have no values yet (model.adapters.begun makes first ones).
    """

    def __init__(self, config: GPTConfig, adapter: Adapter | None = None):
        super().__init__()
        self.config, self.adapter = config, adapter
        self.model = Decoder(config)
        # tied: the embedding is the head, and there is no second name for it anywhere, files included
        tied = config.tie_embeddings or config.scores
        self.lm_head = None if tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.score = nn.Linear(config.dim, 1, bias=False) if config.scores else None
        self.compiled: Compiler = as_it_is
        roles = self.roles()
        for name, parameter in self.named_parameters():
            init_weight(name, parameter, roles[name], config)
        if adapter is not None:
            install(adapter, self)
            self.model.prefix_length = adapter.prefix_length

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, dim); (1, dim) of a network that scores."""
        module = self.score or self.lm_head or self.model.embed_tokens
        return module.weight if self.adapter is None else effective_weight(module)

    def num_parameters(self, learnt: bool = False) -> int:
        """Of all, or of those that are learnt."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad or not learnt)

    def flops_per_token(self, seq_len: int) -> float:
        """As of `GPTConfig`. Beside an adapter no gradient of the other matrices is made, 2 N of their 6 N; its own are
        counted like theirs."""
        flops = self.config.flops_per_token(seq_len)
        if self.adapter is None:
            return flops
        return flops - 2.0 * self.config.multiplied() + 6.0 * self.num_parameters(learnt=True)

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks in order: what is sharded, compiled or recomputed one by one."""
        return list(self.model.layers.children())

    def recompute_activations(self, wanted: bool) -> None:
        """Whether training keeps only what enters a block, and computes the rest again in the backward pass."""
        self.model.grad_checkpointing = wanted

    def compile_parts(self, backend: Any = "inductor") -> None:
        """torch.compile each block, all sharing one graph, and the loss of a chunk of tokens."""
        for block in self.blocks():
            block.compile(dynamic=False, backend=backend)
        self.compiled = cache(partial(torch.compile, dynamic=True, backend=backend))

    def roles(self) -> "dict[str, Role]":
        """What every parameter is for, by name. It looks at modules, not shapes, so it holds for a sharded model."""
        heads = (self.lm_head, self.score)
        return {
            f"{path}.{name}".removeprefix("."): Role.HEAD if module in heads else role_in(module, name)
            for path, module in self.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        layout: Layout | None = None,
        learnt: Tensor | None = None,
        criterion: "Criterion | None" = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits (batch, sequence, vocabulary) or scores (batch, sequence, 1); or, with labels, the losses of single
        tokens.

        Args:
            input_ids: (batch, sequence).
            position_ids: (batch, sequence); a document starts wherever it is 0, and attention stays within a
                document. None: each row is one document.
            labels: (batch, sequence), already shifted (labels[i] is the token after input_ids[i]), -100 where
                nothing is to be learnt. The result is then -log p(label), nats, float32 (batch, sequence), 0 at
                ignored places; the logits are made and dropped a chunk of tokens at a time.
            layout: where the documents lie that position_ids tell of: it changes no number, but the time.
            learnt: int64 (supervised,), the places of the rows laid end to end that have a label; else looked for.
            criterion: what to make of the places that learn instead, of their hidden states and the head's weight; the
                result is what it gives. `summed_nll` gives the sum, without a second head product for the gradient.
        """
        hidden = self.model(input_ids, position_ids, layout)
        return F.linear(hidden, self.head_weight) if labels is None else self.said(hidden, labels, learnt, criterion)

    def said(
        self, hidden: Tensor, labels: Tensor, learnt: Tensor | None = None, criterion: "Criterion | None" = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The last part of `forward`, of hidden states behind the last norm: what is made of the places that learn."""
        if learnt is None:
            learnt = (labels != IGNORE).flatten().nonzero()[:, 0]
        hidden, weight = (x.to(computed_in(x)) for x in (hidden, self.head_weight))
        hidden, targets = hidden.flatten(0, 1).index_select(0, learnt), labels.flatten().index_select(0, learnt)
        places = Places(hidden, weight, targets, learnt, labels.shape, self.compiled)
        with torch.autocast(labels.device.type, enabled=False):  # as in the backward pass: compiled, they share a graph
            return nll_by_place(places)[0] if criterion is None else criterion(places)


class Role(Enum):
    """What a parameter is for. Weight decay, Muon and first weights follow from it, whoever asks."""

    HIDDEN = "hidden matrix"
    EMBEDDING = "embedding"
    ADAPTER = "adapter's matrix"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"  # of a module that is none of ours: learnt by AdamW without decay

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: on matrices that multiply, never on look-ups and scales."""
        return self in (Role.HIDDEN, Role.HEAD, Role.ADAPTER)

    @property
    def orthogonal(self) -> bool:
        """Whether Muon's orthogonalized update fits: for matrices between hidden states."""
        return self is Role.HIDDEN


def role_in(module: nn.Module, name: str) -> Role:
    """The role of the parameter of this name that stands directly in a module."""
    kinds = {nn.Linear: Role.HIDDEN, nn.Embedding: Role.EMBEDDING, RMSNorm: Role.NORM}
    if name in MATRICES:
        return Role.ADAPTER
    role = next((role for kind, role in kinds.items() if isinstance(module, kind)), Role.OTHER)
    return role if name == "weight" else Role.OTHER  # a bias is none of these


@torch.no_grad()
def init_weight(
    name: str, weight: Tensor, role: Role, config: GPTConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Fill one parameter: normal(0, 0.02), the two matrices that write into the residual stream scaled by
    1/sqrt(2 layers) (GPT-2); norms are 1."""
    if role is Role.NORM or weight.dim() == 1:
        return weight.fill_(1.0)
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return weight.normal_(0.0, 0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02, generator=generator)


def fresh_weights(config: GPTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and full float32 tensor of every parameter, made one at a time: the same for one seed, whoever holds which
    part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = GPT(config)
    roles = model.roles()
    for name, parameter in model.named_parameters():
        yield name, init_weight(name, torch.empty(parameter.shape), roles[name], config, generator)


def with_score(weights: Iterable[tuple[str, Tensor]], config: GPTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a network that writes -> of one that scores: first values of its one row, the same for one seed, in
    place of the vocabulary's head."""
    yield from body(weights)
    generator = torch.Generator().manual_seed(seed)
    yield SCORE, init_weight(SCORE, torch.empty(1, config.dim), Role.HEAD, config, generator)


# What is made of hidden states, which is a loss: of (tokens, dim), the head's (vocabulary, dim) and (tokens,) targets.
# The logits of all tokens are larger than all else in a small model, so they are made and dropped a chunk at a time.


class Losses(NamedTuple):
    """Of a chunk of tokens."""

    loss: Tensor  # float32 (tokens,), nats
    gradient: Tensor  # (tokens, vocabulary), of each by its logits, in their type
    nll: Tensor | None = None  # float32 (tokens,): -log p(target), where the loss is another


def cross_entropy(logits: Tensor, targets: Tensor) -> Losses:
    """-log softmax(logits)[target]; its gradient is softmax - onehot."""
    softmax = logits.softmax(-1, dtype=torch.float32)
    # log of the sum by way of the largest probability, which never is too small to have a logarithm
    log_sum = logits.amax(-1).float() - softmax.amax(-1).log()
    label = targets[:, None]
    nll = log_sum - logits.gather(1, label)[:, 0].float()
    softmax.scatter_add_(1, label, torch.full_like(label, -1.0, dtype=torch.float32))
    return Losses(nll, softmax.to(logits.dtype))


Compiler = Callable[[Callable[..., Losses]], Callable[..., Losses]]


def as_it_is(function: Callable[..., Losses]) -> Callable[..., Losses]:
    """The compiler of a network that is not compiled."""
    return function


class Places(NamedTuple):
    """The places that learn, of rows laid end to end: what a criterion makes its loss of."""

    hidden: Tensor  # (tokens, dim), in the type that products are computed in
    weight: Tensor  # (vocabulary, dim), the head's, in the same
    targets: Tensor  # int64 (tokens,)
    learnt: Tensor  # int64 (tokens,), which places they are
    shape: torch.Size  # (rows, sequence) of all places
    compiled: Compiler  # what the function of a chunk's losses goes through

    def cross_entropy(self) -> "ChunkLoss":
        function, targets = self.compiled(cross_entropy), self.targets  # without what else is held here
        return lambda logits, part: function(logits, targets[part])


ChunkLoss = Callable[[Tensor, slice], Losses]  # of a chunk's logits, and which of the places it is
Criterion = Callable[[Places], tuple[Tensor, ...]]


def nll_by_place(places: Places, batch: object = None) -> tuple[Tensor]:
    """-log p(target) at every place, nats, 0 where there is none: float32 (rows, sequence). `batch` is what other
    criteria look at."""
    return (in_rows(ChunkedNLL.apply(places.hidden, places.weight, places.cross_entropy()), places),)


def score_by_place(places: Places, batch: object = None) -> tuple[Tensor, Tensor, Tensor]:
    """What a head of one row says at the places that learn: float32 (rows, sequence), 0 elsewhere, behind a sum of
    -log p and of another loss, of which there are none."""
    scores = F.linear(places.hidden.float(), places.weight.float())[:, 0]
    none = scores.new_zeros(())
    return none, none, in_rows(scores, places)


def in_rows(values: Tensor, places: Places) -> Tensor:
    """One value a place that learns, (supervised,), put where it stands: (rows, sequence), 0 elsewhere. It is no view,
    which FSDP would warn of in what a network returns."""
    row, column = places.learnt // places.shape[1], places.learnt % places.shape[1]
    return values.new_zeros(places.shape).index_put((row, column), values)


def summed_nll(places: Places, batch: object = None) -> tuple[Tensor]:
    """Their sum, float32 ()."""
    total, _ = SummedLoss.apply(places.hidden, places.weight, places.cross_entropy())
    return (total,)


class ChunkedNLL(torch.autograd.Function):
    """The losses of the single tokens, float32 (tokens,). Their gradients are weighed by what follows, so the backward
    pass makes each chunk's logits again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, losses: ChunkLoss
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.losses = losses
        nll = torch.empty(len(hidden), device=hidden.device)
        for part in chunks(hidden, weight):
            nll[part] = losses(hidden[part] @ weight.T, part).loss
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        gradient = HeadGradient(hidden, weight, ctx.needs_input_grad[1])
        for part in chunks(hidden, weight):
            of_logits = ctx.losses(hidden[part] @ weight.T, part).gradient
            gradient.add(part, of_logits.mul_(grad[part, None]))
        return gradient.hidden, None if gradient.weight is None else gradient.weight.to(weight.dtype), None


class SummedLoss(torch.autograd.Function):
    """Their sum, float32 (), and beside it the sum of -log p where that is another, which has no gradient. Every
    token's gradient is then the same multiple of its own, whatever follows, so it is made in the forward pass, while
    the logits are there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, losses: ChunkLoss
    ) -> tuple[Tensor, Tensor]:
        total, nll = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        gradient = HeadGradient(hidden, weight, ctx.needs_input_grad[1]) if any(ctx.needs_input_grad) else None
        for part in chunks(hidden, weight):
            found = losses(hidden[part] @ weight.T, part)
            total += found.loss.sum()
            if found.nll is not None:
                nll += found.nll.sum()
            if gradient is not None:
                gradient.add(part, found.gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient.hidden, gradient.weight)
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        return hidden * grad.to(hidden.dtype), None if weight is None else (weight * grad).to(ctx.dtype), None


class HeadGradient:
    """What a loss's gradient is by the head's input and weight, added up over chunks of tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, learnt: bool):
        """learnt: whether the weight's is wanted; where an adapter leaves the head as it is, it is not."""
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if learnt else None

    def add(self, part: slice, logits: Tensor) -> None:
        """logits: (tokens, vocabulary), the gradient by a chunk's logits."""
        hidden, weight = self.inputs
        torch.mm(logits, weight, out=self.hidden[part])
        if self.weight is None:
            return
        if self.weight.dtype == logits.dtype:
            self.weight.addmm_(logits.T, hidden[part])
        else:
            self.weight += logits.T @ hidden[part]


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Tokens whose logits are made together: as many as fit into LOSS_BYTES in float32."""
    size = max(LOSS_TOKENS, LOSS_BYTES.get(hidden.device.type, LOSS_BYTES["cuda"]) // (4 * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
