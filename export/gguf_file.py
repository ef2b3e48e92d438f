"""A model and its tokenizer in one GGUF file, which llama.cpp, Ollama and LM Studio open.

    write_gguf(model, tokenizer, Path("chat.gguf"), "q8_0", "chat")

    model.layers.0.self_attn.q_proj.weight (512, 512) float32   ->   blk.0.attn_q.weight q8_0, rows in another order
    config.json, tokenizer, chat template    ->   llama.block_count = 8, tokenizer.ggml.tokens = [...], ...

llama.cpp's `llama` turns neighbouring channels of queries and keys, (0, 1), (2, 3), ...; Hugging Face's layout, ours,
turns channel i with i + head_dim / 2. Rows of the two matrices are put in that order. Its `qwen3` turns them as we do.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

from dataset import TextTokenizer, render_chat
from dataset.tokenizer import CHAT_TEMPLATE, HFTokenizer
from export.vocabulary import Vocabulary, vocabulary
from model import GPT, GPTConfig
from model.attention import rope_frequencies
from model.config import check_writes

KINDS = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf(model: GPT, tokenizer: TextTokenizer, path: Path, dtype: str, name: str) -> list[str]:
    """What differs in the file from the model, in words. `dtype` is of matrices: f32, f16, bf16 or q8_0 (8 bits a
    weight and a 16-bit scale for each 32); vectors stay float32.

    Raises ValueError for a reward model, for an adapter beside the weights, and for a tokenizer or rotary positions
    that llama.cpp does not have.
    """
    check_writes(model.config)
    if model.adapter is not None:
        raise ValueError(f"a {model.adapter.kind} adapter does not merge into the weights, and GGUF has none like it")
    words = vocabulary(tokenizer, model.config.vocab_size)
    kind, file_type = KINDS[dtype]
    architecture = "qwen3" if model.config.qk_norm else "llama"
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer, words)
    larger = add_weights(writer, model, gguf.MODEL_ARCH.QWEN3 if model.config.qk_norm else gguf.MODEL_ARCH.LLAMA, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if larger:
        words.notes.append(f"{larger} matrices have rows of no multiple of 32 and are kept as f16, not {dtype}")
    return words.notes


def add_shape(writer: GGUFWriter, config: GPTConfig) -> None:
    assert config.head_dim is not None and config.ffn_dim is not None
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling and config.qk_norm:
        raise ValueError(f"llama.cpp's qwen3 has no rotary positions of type {scaling['rope_type']}")
    elif scaling:
        plain = GPTConfig(**(vars(config) | {"rope_scaling": None}))
        slowed = rope_frequencies(plain, torch.device("cpu")) / rope_frequencies(config, torch.device("cpu"))
        writer.add_tensor("rope_freqs.weight", slowed.numpy())


def add_tokenizer(writer: GGUFWriter, tokenizer: TextTokenizer, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.end_of_turn_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.space_prefix)
    if (template := chat_template(tokenizer)) is not None:
        writer.add_chat_template(template)


def begins_with_bos(tokenizer: TextTokenizer) -> bool:
    """Whether llama.cpp is to put <s> before a text: where a document begins so, and a conversation too."""
    if tokenizer.bos_id is None or not tokenizer.has_chat_template:
        return tokenizer.bos_id is not None
    return render_chat(tokenizer, [{"role": "user", "content": "x"}], True).ids[0] == tokenizer.bos_id


def chat_template(tokenizer: TextTokenizer) -> str | None:
    """The Jinja text, where there is one."""
    if isinstance(tokenizer, HFTokenizer):
        template = tokenizer.hf.chat_template
        return template.get("default") if isinstance(template, dict) else template
    path = tokenizer.folder / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def add_weights(writer: GGUFWriter, model: GPT, architecture: gguf.MODEL_ARCH, kind: Kind) -> int:
    """How many matrices could not be written as `kind`."""
    names, config, larger = gguf.get_tensor_name_map(architecture, model.config.n_layers), model.config, 0
    weight: Tensor
    for ours, weight in model.named_parameters():
        theirs = names.get_name(ours, try_suffixes=(".weight",))
        assert theirs is not None, ours
        if architecture == gguf.MODEL_ARCH.LLAMA and ours.endswith(("q_proj.weight", "k_proj.weight")):
            weight = neighbouring(weight, config.n_heads if "q_proj" in ours else config.n_kv_heads)
        array = weight.detach().float().cpu().contiguous().numpy()
        fits = kind != Kind.Q8_0 or array.shape[-1] % 32 == 0
        larger += array.ndim > 1 and not fits
        stored = Kind.F32 if array.ndim == 1 else kind if fits else Kind.F16
        writer.add_tensor(theirs, as_kind(array, stored), raw_dtype=stored)
    return larger


def as_kind(array: np.ndarray, kind: Kind) -> np.ndarray:
    return gguf.quants.quantize(array, kind)


def neighbouring(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head, those of channels (0, half), (1, half + 1), ... next to each other.

    Two heads of four channels: rows 0 1 2 3 | 4 5 6 7 -> 0 2 1 3 | 4 6 5 7
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
