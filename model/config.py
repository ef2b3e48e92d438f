"""The shape of a network, and its translation to and from a Hugging Face `config.json`.

    GPTConfig(dim=512, n_layers=8)                     25.830 M parameters with the shipped 6,400-piece vocabulary
    GPTConfig(dim=512, n_layers=8).to_hf()             {"model_type": "llama", "hidden_size": 512, ...}
    GPTConfig.from_hf(json.load(open("config.json")))  the same object again

`qk_norm` decides the family: with it the network is a Qwen3, without it a Llama. `scores` decides the head: with it
the network says one number of a text, as a reward model does, and writes none.
"""

import math
from dataclasses import dataclass
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3")
SCORES = "ForSequenceClassification"  # end of the name of an architecture with a head for labels: here, of one
HFConfig = dict[str, Any]  # a Hugging Face config.json, or an object in it


def default_ffn_dim(dim: int) -> int:
    """SwiGLU width: two thirds of 4 * dim (Shazeer 2020, arXiv:2002.05202), rounded up to a multiple of 64."""
    return 64 * math.ceil(8 * dim // 3 / 64)


def default_shape(dim: int, n_heads: int | None = None) -> dict[str, int]:
    """Layers and heads of a width, for whoever says no more: a layer for every 64 of it (beyond 1,024: every 128), four
    at least; eight heads, or fewer that are 32 wide, or more that are 128 wide; keys and values for every fourth head
    or so, by a power of two, which tensor ranks can share."""
    even = [n for n in range(1, dim // 2 + 1) if dim % (2 * n) == 0]  # numbers of heads of an even width
    heads = n_heads or nearest(even or [1], min(max(8, dim / 128), dim / 32))
    shared = [n for n in (2**power for power in range(heads.bit_length())) if heads % n == 0]
    layers = max(4, min(round(dim / 64), 8 + dim // 128))
    return {"n_layers": layers, "n_heads": heads, "n_kv_heads": nearest(shared, heads / 4)}


def nearest(numbers: list[int], wanted: float) -> int:
    """By ratio; of sizes below one, which GPTConfig refuses, any."""
    return min(numbers, key=lambda number: max(number / wanted, wanted / number))


@dataclass
class GPTConfig:
    """Shape of a decoder-only network. Raises ValueError for sizes that do not fit together."""

    vocab_size: int = 6400
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int | None = None  # dim / n_heads where not given
    ffn_dim: int | None = None  # default_ffn_dim(dim) where not given
    max_seq_len: int = 512
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    rope_scaling: HFConfig | None = None  # Hugging Face's keys; types "linear" and "llama3"
    scores: bool = False  # a head of one row, in place of the vocabulary's

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            fitting = ", ".join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}; n_kv_heads may be {fitting}"
            )
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}; {self.fitting()}")
            self.head_dim = self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs, so dim / n_heads must be even; "
                + self.fitting()
            )
        if self.ffn_dim is None:
            self.ffn_dim = default_ffn_dim(self.dim)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")

    def fitting(self) -> str:
        """The widths next to `dim` that `n_heads` heads of an even width make up, in words."""
        step = 2 * self.n_heads
        below = self.dim // step * step
        return f"take dim {f'{below} or ' if below else ''}{below + step}, or another n_heads"

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of one token's forward and backward pass: 6 N + 12 L H Q T (PaLM, arXiv:2204.02311, appendix B).

        N are the parameters of matrix products, the head's included and the embedding look-up's not; L layers, H heads
        of width Q, T = seq_len. The paper's count takes attention as if every token saw all T, which causal masks and
        packed documents do not: what is reported is a little high. Recomputed activations are not counted.
        """
        assert self.head_dim is not None
        return 6.0 * self.multiplied() + 12.0 * self.n_layers * self.n_heads * self.head_dim * seq_len

    def multiplied(self) -> int:
        """N, the parameters of matrix products."""
        assert self.head_dim is not None and self.ffn_dim is not None
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        head = 1 if self.scores else self.vocab_size
        return self.n_layers * (attention + 3 * self.dim * self.ffn_dim) + self.dim * head

    def to_hf(self) -> HFConfig:
        """The contents of config.json: a Llama, or a Qwen3 where qk_norm is set."""
        family = "qwen3" if self.qk_norm else "llama"
        architecture = ("Qwen3" if self.qk_norm else "Llama") + (SCORES if self.scores else "ForCausalLM")
        label = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if self.scores else {}
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        return {
            "architectures": [architecture],
            "model_type": family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "intermediate_size": self.ffn_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            # transformers 5 reads rope_parameters; 4.x, vLLM and llama.cpp read the two older keys
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        } | label

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "GPTConfig":
        """Read config.json of a Llama- or Qwen3-family folder. Raises ValueError for anything else."""
        family = hf.get("model_type")
        if family not in ("llama", "qwen3"):
            raise ValueError(f"model_type is {family!r}; only 'llama' and 'qwen3' folders can be opened")
        for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if hf.get(key):
                raise ValueError(f"config.json sets {key}; networks with it are not supported")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json sets hidden_act {hf['hidden_act']!r}; only 'silu' is supported")
        scores = any(name.endswith(SCORES) for name in hf.get("architectures") or [])
        labels = len(hf.get("id2label") or "ab")  # transformers leaves id2label out where there are two
        if scores and labels != 1:
            raise ValueError(
                f"config.json has a head for {labels} labels; only a reward model's can be opened, for one"
            )
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        n_heads = hf["num_attention_heads"]
        # where these are left out, the value is the family's default in transformers, not a guess from the others
        qwen3 = family == "qwen3"
        return cls(
            vocab_size=hf["vocab_size"],
            dim=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=hf.get("num_key_value_heads") or n_heads,
            head_dim=hf.get("head_dim") or (128 if qwen3 else None),
            ffn_dim=hf["intermediate_size"],
            max_seq_len=hf.get("max_position_embeddings", 2048),
            rope_theta=float(theta),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            qk_norm=qwen3,
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            scores=scores,
        )


def check_writes(config: GPTConfig, what: str = "this model") -> None:
    """Raise ValueError, which begins with `what`, for a network whose head gives a score in place of tokens."""
    if config.scores:
        raise ValueError(f"{what} is a reward model: it scores answers and writes none; give one that writes")
