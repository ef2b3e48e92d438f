"""JSONL files to tokens to packed batches; the tokenizer and the sample data live here. Knows nothing of training."""

from typing import TYPE_CHECKING

from dataset.later import later

if TYPE_CHECKING:
    from dataset.batch import Batch, PairBatch
    from dataset.chat import Message, Rendered, parse_answer, render_chat
    from dataset.encode import build_dpo_loader, build_parts, build_pretrain_loader, build_rows, build_sft_loader
    from dataset.forms import CONVERSATION, FORMS, LABELLED, PAIR, PROMPT, SCORED, TEXT
    from dataset.loader import Loader
    from dataset.records import DataError
    from dataset.tokenizer import DEFAULT_TOKENIZER, TextTokenizer, Tokenizer, load_tokenizer
else:  # batches need torch, which takes a second to import and 150 MB; processes that encode do without
    __getattr__ = later(
        {
            "dataset.batch": ("Batch", "PairBatch"),
            "dataset.chat": ("Message", "Rendered", "parse_answer", "render_chat"),
            "dataset.encode": (
                "build_dpo_loader",
                "build_parts",
                "build_pretrain_loader",
                "build_rows",
                "build_sft_loader",
            ),
            "dataset.forms": ("CONVERSATION", "FORMS", "LABELLED", "PAIR", "PROMPT", "SCORED", "TEXT"),
            "dataset.loader": ("Loader",),
            "dataset.records": ("DataError",),
            "dataset.tokenizer": ("DEFAULT_TOKENIZER", "TextTokenizer", "Tokenizer", "load_tokenizer"),
        }
    )

__all__ = [
    "CONVERSATION",
    "DEFAULT_TOKENIZER",
    "FORMS",
    "LABELLED",
    "PAIR",
    "PROMPT",
    "SCORED",
    "TEXT",
    "Batch",
    "DataError",
    "Loader",
    "Message",
    "PairBatch",
    "Rendered",
    "TextTokenizer",
    "Tokenizer",
    "build_dpo_loader",
    "build_parts",
    "build_pretrain_loader",
    "build_rows",
    "build_sft_loader",
    "load_tokenizer",
    "parse_answer",
    "render_chat",
]
