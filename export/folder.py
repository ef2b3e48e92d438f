"""A model and its tokenizer as a Hugging Face folder to give away, in a number format and in shards.

write_folder(model, tokenizer, Path("chat"), torch.bfloat16, "2GB")

chat/config.json  model.safetensors (or shards and their index)  generation_config.json  tokenizer files
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dataset import TextTokenizer
from model import GPT, save_pretrained


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which is `path` once all is written. Raises ValueError where that exists."""
    if path.exists():
        raise ValueError(f"--out {path} is there already; give a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as beside:
        yield (part := Path(beside) / path.name)
        part.rename(path)


def write_folder(
    model: GPT,
    tokenizer: TextTokenizer,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
) -> None:
    """Raises ValueError for an adapter that does not merge into the weights."""
    if model.adapter is not None:
        raise ValueError(f"a {model.adapter.kind} adapter is no change of weights, so it does not merge")
    save_pretrained(
        model,
        folder,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    tokenizer.save(folder)
