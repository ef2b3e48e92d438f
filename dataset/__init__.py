"""JSONL files to tokens to packed batches; the tokenizer and the sample data live here. Knows nothing of training."""

from dataset.batch import Batch, PairBatch
from dataset.chat import Rendered, render_chat
from dataset.loader import Loader, build_dpo_loader, build_pretrain_loader, build_rows, build_sft_loader
from dataset.records import DataError
from dataset.tokenizer import DEFAULT_TOKENIZER, Tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_TOKENIZER",
    "Batch",
    "DataError",
    "Loader",
    "PairBatch",
    "Rendered",
    "Tokenizer",
    "build_dpo_loader",
    "build_pretrain_loader",
    "build_rows",
    "build_sft_loader",
    "load_tokenizer",
    "render_chat",
]
