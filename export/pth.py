"""MiniMind's weight files: a state dict in one .pth, its shape partly left to the reader.

    full_sft_512.pth   {"model.layers.0.self_attn.q_proj.weight": float16 (512, 512), ..., "lm_head.weight": ...}
    read_pth(...)      GPT(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, ...)

Since April 2025 its parameters carry Hugging Face's names, and its rotary layout is Hugging Face's too; with q_norm and
k_norm (minimind-3) a model is a Qwen3, without (minimind2) a Llama. What no tensor tells is MiniMind's default:
`ASSUMED`, and 8 heads where there is no q_norm.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig
from model.files import compare
from model.folder import assemble

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ASSUMED: dict[bool, dict[str, Any]] = {  # by whether there is a q_norm
    False: {"n_heads": 8, "rope_theta": 1e6, "norm_eps": 1e-5, "max_seq_len": 32768},
    True: {"rope_theta": 1e6, "norm_eps": 1e-6, "max_seq_len": 32768},
}


def read_pth(path: Path, given: Mapping[str, Any]) -> GPT:
    """`given` are settings to take in place of the assumed ones. Only tensors are read: a pickle that would run code is
    refused.

    Raises ValueError for a file that is not of this layout, saying of which it is where that is known.
    """
    weights = load_tensors(path)
    config = shape_of(weights, given, path)
    if config.tie_embeddings:
        weights.pop(HEAD, None)
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    compare(found, wanted, f"{path}: these are not the weights of a {config.to_hf()['architectures'][0]}")
    return assemble(config, ((name, tensor.float()) for name, tensor in weights.items()))


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen kinds of their own
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as tensors: {first}") from None
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        raise ValueError(f"{path} is a state to resume from; give the weight file beside it, without _resume")
    if not (isinstance(weights, dict) and all(isinstance(each, Tensor) for each in weights.values())):
        raise ValueError(f"{path}: found {type(weights).__name__}, expected tensors by name")
    for wrong, what in (
        ("tok_embeddings.weight", "names from before April 2025, whose rotary layout is another"),
        ("model.layers.0.mlp.gate.weight", "a mixture of experts, which there is no network for here"),
    ):
        if wrong in weights:
            raise ValueError(f"{path} has {what}")
    if EMBEDDING not in weights:
        raise ValueError(f"{path}: found no {EMBEDDING}, expected MiniMind's names; it has {', '.join([*weights][:3])}")
    return {name: tensor for name, tensor in weights.items() if not re.search(r"freqs_(cos|sin)$", name)}


def shape_of(weights: Mapping[str, Tensor], given: Mapping[str, Any], path: Path) -> GPTConfig:
    """From the tensors where they tell, else as given, else as MiniMind's default is."""
    first = "model.layers.0."
    try:
        queries, keys = (weights[f"{first}self_attn.{each}_proj.weight"].shape[0] for each in "qk")
        ffn_dim = weights[f"{first}mlp.gate_proj.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"{path}: found no {missing}, expected MiniMind's names") from None
    norm = weights.get(f"{first}self_attn.q_norm.weight")
    settings = {**ASSUMED[norm is not None], **given}
    head_dim = queries // settings["n_heads"] if norm is None else norm.shape[0]
    vocab_size, dim = weights[EMBEDDING].shape
    return GPTConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=1 + max(int(found[1]) for name in weights if (found := re.match(r"model\.layers\.(\d+)\.", name))),
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        n_kv_heads=keys // head_dim,
        qk_norm=norm is not None,
        tie_embeddings=HEAD not in weights or torch.equal(weights[HEAD], weights[EMBEDDING]),
        **(settings | {"n_heads": queries // head_dim}),
    )


def write_pth(model: GPT, path: Path, dtype: torch.dtype) -> list[str]:
    """What MiniMind would take for granted and is otherwise here, in words. The head is written also where it is the
    embedding, as MiniMind does."""
    config = model.config
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.named_parameters()}
    torch.save(weights | {HEAD: weights.get(HEAD, weights[EMBEDDING])}, path)
    assumed = ASSUMED[config.qk_norm]
    return [
        f"{name} is {getattr(config, name)}, which the file does not say and MiniMind takes to be {value}"
        for name, value in assumed.items()
        if getattr(config, name) != value and name != "max_seq_len"
    ]
