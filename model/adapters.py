"""Adapters: a few new parameters are learnt beside weights that stay as they are.

    adapter = LoRA(rank=16, alpha=32, targets=("q_proj", "v_proj"))
    model = GPT(config, adapter)                  its projections are LoRALinear; only their A and B are learnt
    begun(weights, adapter, seed)                 weights of a plain network -> those, and first values of A and B
    merged(weights, adapter, learnt)              -> weights of a plain network that says what the adapted one says

A module gets new parameters, or changes its class, where it stands: its `weight` keeps name and place, so that
everything that goes by names (files, roles, sharding) finds what it found before. A kind of adapter is a subclass of
`Adapter` and its line in ADAPTERS.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)
Named = tuple[str, Tensor]  # of a parameter
Settings = dict[str, Any]  # the contents of PEFT's adapter_config.json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SCORING = "SEQ_CLS"  # PEFT's word for networks that score
VOCABULARY = ("model.embed_tokens", "lm_head")  # the modules with a row for every token
SCORE = "score.weight"  # the head of a network that scores: new, so always learnt
MATRICES = ("lora_A", "lora_B", "adapter_down", "adapter_up")  # names of parameters that multiply
A, B, MAGNITUDE, ROWS = "lora_A", "lora_B", "lora_magnitude_vector", "trainable_tokens_delta"
PEFT_ROWS = f"token_adapter.{ROWS}"
PREFIX, EMBEDDINGS = "model.layers.{}.self_attn.prefix", "prompt_embeddings"  # a layer's, and PEFT's name of them all
PREFIX_STD = 1.0  # of first values, as in PEFT
INTO_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """One adapter's settings, and what follows from them."""

    kind: ClassVar[str]
    theirs: ClassVar[dict[str, str]]  # PEFT's ends of the names of parameters, by ours
    merges: ClassVar[bool] = True  # whether a plain network can say what the adapted one says
    chats: ClassVar[bool] = True  # whether control tokens are learnt unasked where a chat begins

    tokens: tuple[int, ...] = ()  # those whose rows of embedding and head are learnt
    scores: bool = False  # whether it makes a network that scores of its base; it then holds that one's head
    base: str = ""  # the model folder that it stands on
    base_hash: str = ""  # of that model's weights; not known of what PEFT has made

    @abstractmethod
    def install(self, network: nn.Module) -> None:
        """Give modules their new parameters, in place and without values."""

    @abstractmethod
    def first(self, name: str, weight: Tensor, generator: torch.Generator) -> Iterator[Named]:
        """First values of the parameters that stand beside the one of this name."""

    def merge(self, name: str, weight: Tensor, learnt: Mapping[str, Tensor]) -> Tensor:
        """The parameter of this name that does without those beside it. For kinds that merge."""
        raise ValueError(
            f"a {self.kind} adapter is no change of weights, so it cannot be merged into them; a stage goes on "
            f"with it by --adapter {self.kind}, and eval_model.py opens its folder as it is"
        )

    def packed(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters as a file has them, where those are others than a network's."""
        return dict(learnt)

    @classmethod
    def unpacked(cls, stored: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
        """The inverse."""
        return dict(stored)

    @property
    def prefix_length(self) -> int:
        """Places that every document sees before its own."""
        return 0

    @property
    def peft_type(self) -> str:
        return self.kind.upper()

    def shared_settings(self) -> Settings:
        """What adapter_config.json says of every kind."""
        settings: Settings = {
            "peft_type": self.peft_type,
            "task_type": SCORING if self.scores else "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "inference_mode": True,
        }
        if self.scores:
            settings["modules_to_save"] = ["score"]
        if self.tokens:
            paths = VOCABULARY[:1] if self.scores else VOCABULARY
            settings["trainable_token_indices"] = {path.rpartition(".")[2]: list(self.tokens) for path in paths}
        return settings

    @abstractmethod
    def to_peft(self) -> Settings: ...

    @classmethod
    @abstractmethod
    def from_peft(cls, settings: Settings, names: Iterable[str], n_layers: int) -> "Adapter":
        """names: of the parameters that were saved, ours.

        Raises KeyError where a setting is missing, and ValueError for what there is no place for.
        """


# LoRA ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1): y = W x + s B A x, with s = alpha / rank.

    rslora: s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). dora: the rows of W + s B A are scaled to a
    length that is learnt as well (Liu et al. 2024, arXiv:2402.09353, equation 5, its divisor without a gradient).
    """

    kind: ClassVar[str] = "lora"
    theirs: ClassVar[dict[str, str]] = {A: f"{A}.weight", B: f"{B}.weight", ROWS: PEFT_ROWS}

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of what enters A
    targets: tuple[str, ...] = LINEAR  # last parts of the names of linear layers, or whole names
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, path: str) -> bool:
        """Whether the linear layer of this name gets A and B; those of blocks only, as PEFT's "all-linear"."""
        return ".layers." in path and any(path == name or path.endswith(f".{name}") for name in self.targets)

    def install(self, network: nn.Module) -> None:
        """Raises ValueError for a target that names no linear layer of a block."""
        linear = [(path, module) for path, module in network.named_modules() if type(module) is nn.Linear]
        for target in self.targets:
            if not any(LoRA(targets=(target,)).adapts(path) for path, _ in linear):
                raise ValueError(f"{target!r} names no linear layer of a block; there are {', '.join(LINEAR)}")
        for path, layer in linear:
            if self.adapts(path):
                LoRALinear.of(layer, self)

    def first(self, name: str, weight: Tensor, generator: torch.Generator) -> Iterator[Named]:
        """A as nn.Linear's own weights, B zero."""
        path, _, last = name.rpartition(".")
        if last == "weight" and self.adapts(path):
            out, into = weight.shape
            bound = 1 / math.sqrt(into)
            yield f"{path}.{A}", torch.empty(self.rank, into).uniform_(-bound, bound, generator=generator)
            yield f"{path}.{B}", torch.zeros(out, self.rank)
            if self.dora:
                yield f"{path}.{MAGNITUDE}", row_lengths(weight)

    def merge(self, name: str, weight: Tensor, learnt: Mapping[str, Tensor]) -> Tensor:
        path = name.rpartition(".")[0]
        if f"{path}.{B}" in learnt and name.endswith(".weight"):
            a, b = learnt[f"{path}.{A}"], learnt[f"{path}.{B}"]
            return changed(weight, a, b, self.scale, learnt.get(f"{path}.{MAGNITUDE}"))
        return weight

    def to_peft(self) -> Settings:
        return self.shared_settings() | {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, settings: Settings, names: Iterable[str], n_layers: int) -> "LoRA":
        """What is adapted is read off the names, where PEFT may have kept a pattern."""
        adapted = [name.rpartition(".")[0] for name in names if name.endswith(f".{B}")]
        plain = {"bias": "none", "fan_in_fan_out": False, "rank_pattern": {}}
        plain |= {"alpha_pattern": {}, "layer_replication": None, "target_parameters": None, "lora_bias": False}
        for key, expected in plain.items():
            if (settings.get(key) or expected) != expected:
                raise ValueError(f"found {key} {settings[key]!r}, expected {expected!r}: no other can be opened")
        short = tuple(name for name in LINEAR if any(path.endswith(f".{name}") for path in adapted))
        return cls(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings.get("lora_dropout") or 0.0,
            targets=short if len(adapted) == len(short) * n_layers else tuple(sorted(adapted)),
            rslora=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
            tokens=tokens_in(settings),
            base=settings.get("base_model_name_or_path") or "",
        )


class LoRALinear(nn.Linear):
    """nn.Linear with A (rank, in) and B (out, rank), and with DoRA a length for each row, (out,)."""

    adapter: LoRA
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None

    @classmethod
    def of(cls, linear: nn.Linear, adapter: LoRA) -> None:
        linear.__class__ = cls
        made = cast(LoRALinear, linear)
        made.adapter = adapter
        made.lora_A = nn.Parameter(torch.empty(adapter.rank, linear.in_features))
        made.lora_B = nn.Parameter(torch.empty(linear.out_features, adapter.rank))
        made.lora_magnitude_vector = nn.Parameter(torch.empty(linear.out_features)) if adapter.dora else None

    def forward(self, x: Tensor) -> Tensor:
        adapter, y = self.adapter, super().forward(x)
        dropped = F.dropout(x, adapter.dropout, self.training) if adapter.dropout else x
        y = y + F.linear(F.linear(dropped, self.lora_A), self.lora_B) * adapter.scale
        if self.lora_magnitude_vector is None:
            return y
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            length = row_lengths(changed(self.weight, self.lora_A, self.lora_B, adapter.scale))
        return y * (self.lora_magnitude_vector / length).to(y.dtype)

    def effective_weight(self) -> Tensor:
        return changed(self.weight, self.lora_A, self.lora_B, self.adapter.scale, self.lora_magnitude_vector)


def changed(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W + s B A, (out, in); with a magnitude, (out,), its rows are of that length."""
    weight = weight + (b @ a) * scale
    return weight if magnitude is None else weight * (magnitude / row_lengths(weight))[:, None]


def row_lengths(weight: Tensor) -> Tensor:
    """(out, in) -> (out,)."""
    return torch.linalg.vector_norm(weight, dim=1)


# Bottlenecks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Adapter):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751, section 2.1): what attention and feed-forward give,
    h, becomes h + U gelu(D h + d) + u before it is added to the residual stream. D is (size, dim), U (dim, size).

    The paper learns the norms as well, which here stay as they are. Its form on disk is PEFT's two files, but PEFT has
    no such adapter and does not open them.
    """

    kind: ClassVar[str] = "bottleneck"
    theirs: ClassVar[dict[str, str]] = {ROWS: PEFT_ROWS}
    merges: ClassVar[bool] = False

    size: int = 64

    def install(self, network: nn.Module) -> None:
        for path, module in list(network.named_modules()):
            if path.endswith(INTO_RESIDUAL) and isinstance(module, nn.Linear):
                BottleneckLinear.of(module, self.size)

    def first(self, name: str, weight: Tensor, generator: torch.Generator) -> Iterator[Named]:
        """D as nn.Linear's own weights, all else zero."""
        path, _, last = name.rpartition(".")
        if last == "weight" and path.endswith(INTO_RESIDUAL):
            dim, bound = len(weight), 1 / math.sqrt(len(weight))
            yield f"{path}.adapter_down", torch.empty(self.size, dim).uniform_(-bound, bound, generator=generator)
            yield f"{path}.adapter_down_bias", torch.zeros(self.size)
            yield f"{path}.adapter_up", torch.zeros(dim, self.size)
            yield f"{path}.adapter_up_bias", torch.zeros(dim)

    def to_peft(self) -> Settings:
        return self.shared_settings() | {"bottleneck_size": self.size}

    @classmethod
    def from_peft(cls, settings: Settings, names: Iterable[str], n_layers: int) -> "Bottleneck":
        base = settings.get("base_model_name_or_path") or ""
        return cls(size=settings["bottleneck_size"], tokens=tokens_in(settings), base=base)


class BottleneckLinear(nn.Linear):
    """The last matrix of attention or feed-forward, and the bottleneck behind it."""

    adapter_down: nn.Parameter
    adapter_down_bias: nn.Parameter
    adapter_up: nn.Parameter
    adapter_up_bias: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, size: int) -> None:
        linear.__class__ = cls
        made, dim = cast(BottleneckLinear, linear), linear.out_features
        made.adapter_down = nn.Parameter(torch.empty(size, dim))
        made.adapter_down_bias = nn.Parameter(torch.empty(size))
        made.adapter_up = nn.Parameter(torch.empty(dim, size))
        made.adapter_up_bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(super().forward(x))

    def behind(self, h: Tensor) -> Tensor:
        inner = F.gelu(F.linear(h, self.adapter_down, self.adapter_down_bias))
        return h + F.linear(inner, self.adapter_up, self.adapter_up_bias)


def behind(module: nn.Linear, h: Tensor) -> Tensor:
    """What a module gives, where `h` is what its effective weight does."""
    return module.behind(h) if isinstance(module, BottleneckLinear) else h


# Prefixes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prefix(Adapter):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190, equation 3): every layer's attention sees so many places before
    a document's own, whose keys and values are what is learnt. They are parameters themselves, which the paper makes
    with a feed-forward network while it trains (`prefix_projection` in PEFT).

    As in PEFT, keys are not turned by a position, and a document's own positions begin behind the prefix. A network
    whose prefix is new does not say what it said: any key takes its share of attention.
    """

    kind: ClassVar[str] = "prefix"
    theirs: ClassVar[dict[str, str]] = {ROWS: PEFT_ROWS}
    merges: ClassVar[bool] = False
    chats: ClassVar[bool] = False  # PEFT's prefix has no place for rows of tokens

    length: int = 16

    def install(self, network: nn.Module) -> None:
        for path, module in network.named_modules():
            if path.endswith("self_attn"):
                width = cast(nn.Linear, module.k_proj).out_features
                module.register_parameter("prefix", nn.Parameter(torch.empty(self.length, 2 * width)))

    def first(self, name: str, weight: Tensor, generator: torch.Generator) -> Iterator[Named]:
        if name.endswith("self_attn.k_proj.weight"):
            prefix = torch.empty(self.length, 2 * len(weight))
            yield name.replace("k_proj.weight", "prefix"), prefix.normal_(0, PREFIX_STD, generator=generator)

    def packed(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(length, layers * 2 * kv_heads * head_dim): the layers beside each other."""
        others = {name: tensor for name, tensor in learnt.items() if not name.endswith(".prefix")}
        layers = [learnt[PREFIX.format(i)] for i in range(len(learnt) - len(others))]
        return {EMBEDDINGS: torch.cat(layers, 1)} | others

    @classmethod
    def unpacked(cls, stored: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
        layers = stored[EMBEDDINGS].chunk(n_layers, 1) if EMBEDDINGS in stored else ()
        found = {PREFIX.format(i): tensor for i, tensor in enumerate(layers)}
        return found | {name: tensor for name, tensor in stored.items() if name != EMBEDDINGS}

    @property
    def prefix_length(self) -> int:
        return self.length

    @property
    def peft_type(self) -> str:
        """With rows of tokens it is another kind to PEFT, which would not see them and open the rest."""
        return "PREFIX_TUNING_AND_TOKENS" if self.tokens else "PREFIX_TUNING"

    def to_peft(self) -> Settings:
        """PEFT fills in what follows from the base."""
        return self.shared_settings() | {"num_virtual_tokens": self.length, "prefix_projection": False}

    @classmethod
    def from_peft(cls, settings: Settings, names: Iterable[str], n_layers: int) -> "Prefix":
        """One that was learnt by way of a feed-forward network was saved without it, as what that made."""
        base = settings.get("base_model_name_or_path") or ""
        return cls(length=settings["num_virtual_tokens"], tokens=tokens_in(settings), base=base)


class Prefixed(nn.Module):
    """What a network's decoder says of a prefix."""

    prefix_length: int  # places that are seen


# Rows of tokens, of every kind ---------------------------------------------------------------------------------------


def tokens_in(settings: Settings) -> tuple[int, ...]:
    """Raises ValueError where embedding and head learn different rows."""
    rows = settings.get("trainable_token_indices") or []
    kinds = list(rows.values()) if isinstance(rows, dict) else [rows]
    if any(each != kinds[0] for each in kinds):
        raise ValueError("found trainable_token_indices that differ between modules, expected the same for all")
    return tuple(kinds[0])


class LearntRows(nn.Module):
    """An embedding or a head of which some tokens' rows are learnt: `weight` stays, and its rows are replaced."""

    weight: Tensor
    trainable_tokens_delta: nn.Parameter  # (tokens, dim): PEFT's name, though it holds values and no differences
    index: Tensor  # int64 (tokens,)

    @classmethod
    def of(cls, module: nn.Module, tokens: tuple[int, ...]) -> None:
        embeds = isinstance(module, nn.Embedding)
        module.__class__ = LearntEmbedding if embeds else LearntHead
        made = cast(LearntRows, module)
        # no buffer: a network is made without values, and its buffers would be filled with nothing
        made.index = torch.tensor(tokens, device="cpu")
        width = module.embedding_dim if isinstance(module, nn.Embedding) else cast(nn.Linear, module).in_features
        made.trainable_tokens_delta = nn.Parameter(torch.empty(len(tokens), width))

    def effective_weight(self) -> Tensor:
        rows = self.trainable_tokens_delta
        if self.index.device != rows.device:
            self.index = self.index.to(rows.device)
        return self.weight.index_copy(0, self.index, rows)


class LearntEmbedding(LearntRows, nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.effective_weight())


class LearntHead(LearntRows, nn.Linear):
    """It is never called: who needs the head asks for its effective weight."""


def effective_weight(module: nn.Linear | nn.Embedding) -> Tensor:
    """The matrix that a module stands for: its weight, with what an adapter has made of it."""
    return module.effective_weight() if isinstance(module, LoRALinear | LearntRows) else module.weight


# All kinds ----------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "bottleneck": Bottleneck, "prefix": Prefix}
PEFT_TYPES = {kind(tokens=tokens).peft_type: kind for kind in ADAPTERS.values() for tokens in ((), (0,))}
ADAPTED = (LoRALinear, BottleneckLinear, LearntRows)  # classes of modules that something stands beside


def install(adapter: Adapter, network: nn.Module) -> None:
    """Adapt a network in place; from then on its new parameters alone are learnt."""
    before = {name for name, _ in network.named_parameters()}
    adapter.install(network)
    for path, module in list(network.named_modules()) if adapter.tokens else ():
        if path in VOCABULARY:
            LearntRows.of(module, adapter.tokens)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in before or name == SCORE)


@contextmanager
def switched_off(network: N) -> Iterator[N]:
    """The network, and for as long as this lasts it says what it says without its adapter."""
    adapted: dict[nn.Module, type[nn.Module]] = {
        module: type(module) for module in network.modules() if isinstance(module, ADAPTED)
    }
    for module in adapted:
        module.__class__ = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    decoder = cast(Prefixed, network.get_submodule("model"))
    length, decoder.prefix_length = decoder.prefix_length, 0
    try:
        yield network
    finally:
        decoder.prefix_length = length
        for module, kind in adapted.items():
            module.__class__ = kind


def body(weights: Iterable[Named]) -> Iterator[Named]:
    """All parameters but a head's, for another head to take its place."""
    return ((name, weight) for name, weight in weights if name != SCORE and not name.startswith("lm_head."))


def begun(weights: Iterable[Named], adapter: Adapter, seed: int) -> Iterator[Named]:
    """All parameters of a network whose adapter has learnt nothing yet, one at a time: the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights:
        yield name, weight
        yield from adapter.first(name, weight, generator)
        path = name.removesuffix(".weight")
        if adapter.tokens and path in VOCABULARY:
            yield f"{path}.{ROWS}", weight[list(adapter.tokens)]


def merged(weights: Iterable[Named], adapter: Adapter, learnt: Mapping[str, Tensor]) -> Iterator[Named]:
    """Parameters of the plain network that says what the adapted one says, one at a time. Raises ValueError for a kind
    that does not merge."""
    for name, weight in weights:
        rows = learnt.get(f"{name.removesuffix('.weight')}.{ROWS}")
        if rows is not None:
            weight = weight.index_copy(0, torch.tensor(adapter.tokens), rows)
        yield name, adapter.merge(name, weight, learnt)
    if SCORE in learnt:
        yield SCORE, learnt[SCORE]
