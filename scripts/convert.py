"""A model taken elsewhere.

python scripts/convert.py out/full_sft_512 --to gguf --out chat.gguf --dtype q8_0       llama.cpp, Ollama, LM Studio
python scripts/convert.py out/full_sft_512 --to hf --out chat --dtype bfloat16          Hugging Face, with a model card
python scripts/convert.py full_sft_512.pth --to hf --out mini --tokenizer minimind/model     MiniMind's file
python scripts/convert.py out/full_sft_512 --to pth --out full_sft_512.pth              and back
python scripts/convert.py out/chat_lora --to adapter_merged --out out/chat              an adapter and its base
python scripts/convert.py ONE TWO --base BASE --to adapter_merged --out out/chat        several, one after another

SOURCE is a model folder (ours, or any Llama or Qwen3 folder), an adapter, a .pth file, or hf://USER/MODEL.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    import torch

    from dataset import TextTokenizer
    from model import GPT

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # GGUF's names and torch's
DEFAULT = {"gguf": "f16", "pth": "f16", "hf": "f32", "adapter_merged": "f32"}
SHAPES = {"n_heads": int, "rope_theta": float, "norm_eps": float, "max_seq_len": int}  # what a .pth does not say


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user did wrong."""
    arguments = parser().parse_args(argv)
    try:
        check(arguments)
        convert(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("source", nargs="+", metavar="SOURCE", help="a model, or adapters in the order of merging")
    flags.add_argument("--to", required=True, choices=list(DEFAULT), help="what to make of it")
    flags.add_argument("--out", required=True, type=Path, metavar="PATH", help="a new file (gguf, pth) or folder")
    names = [*DTYPES, *DTYPES.values(), "q8_0"]
    flags.add_argument("--dtype", choices=names, help="of the weights [f16 in gguf and pth, else f32]")
    flags.add_argument("--base", metavar="FOLDER", help="what adapters stand on; by default the one the first names")
    flags.add_argument("--max_shard_size", metavar="SIZE", help="hf: several files of at most this, for example 2GB")
    flags.add_argument("--tokenizer", metavar="FOLDER", help="of a .pth file, which has none [the shipped one]")
    for name, kind in SHAPES.items():
        flags.add_argument(f"--{name}", type=kind, metavar=kind.__name__, help="of a .pth file [MiniMind's]")
    flags.add_argument("--license", metavar="NAME", help="for the model card, for example apache-2.0")
    flags.add_argument("--language", nargs="+", default=[], metavar="CODE", help="for the model card: en zh")
    flags.add_argument("--push_to_hub", metavar="USER/NAME", help="upload what was made to this model repository")
    flags.add_argument("--private", action="store_true", help="keep that repository private, where it is new")
    return flags


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything slow is done."""
    pth = any(name.endswith(".pth") for name in arguments.source)
    if arguments.dtype == "q8_0" and arguments.to != "gguf":
        raise ValueError(f"--dtype q8_0 is a format of GGUF; with --to {arguments.to} give {', '.join(DTYPES)}")
    if arguments.max_shard_size and arguments.to != "hf":
        raise ValueError(f"--max_shard_size belongs to --to hf; --to {arguments.to} writes one file of weights")
    if pth and (len(arguments.source) > 1 or arguments.base):
        raise ValueError("a .pth file is converted alone; make it a folder with --to hf before adapters come to it")
    given = [name for name in (*SHAPES, "tokenizer") if getattr(arguments, name) is not None]
    if given and not pth:
        raise ValueError(f"--{given[0]} is for a .pth file; {arguments.source[0]} says that by itself")
    if arguments.private and not arguments.push_to_hub:
        raise ValueError("--private belongs to --push_to_hub")


def convert(arguments: argparse.Namespace) -> None:
    from export.folder import new_path

    with new_path(arguments.out) as part:
        model, tokenizer, run = open_source(arguments)
        notes = WRITERS[arguments.to](model, tokenizer, part, arguments, run)
    print(f"{arguments.out}: {model.num_parameters():,} parameters, {size_of(arguments.out) / 1e6:,.1f} MB")
    for note in notes:
        print(f"note: {note}")
    if arguments.to == "gguf":
        beside(tokenizer, arguments.out, model.config.max_seq_len)
    if arguments.push_to_hub:
        from export.hub import upload

        print(f"uploaded: {upload(arguments.out, arguments.push_to_hub, arguments.private)}")


def open_source(arguments: argparse.Namespace) -> tuple[GPT, TextTokenizer, Path]:
    """The model with its adapters merged, its tokenizer, and the folder of the run that made what came last."""
    from dataset import DEFAULT_TOKENIZER, load_tokenizer
    from dataset.hub import local_path
    from model import load_pretrained
    from model.adapter_folder import is_adapter, tokenizer_folder

    folders = [Path(local_path(name)) for name in arguments.source]
    if folders[0].suffix == ".pth":
        from export.pth import read_pth

        given = {name: value for name in SHAPES if (value := getattr(arguments, name)) is not None}
        return read_pth(folders[0], given), load_tokenizer(arguments.tokenizer or DEFAULT_TOKENIZER), folders[0].parent
    merging = arguments.to == "adapter_merged" or arguments.base
    for folder in folders if merging else folders[1:]:
        if not is_adapter(folder):
            raise ValueError(f"{folder}: no adapter_config.json here, so this is no adapter; a base is given as --base")
    first, *others = ([Path(local_path(arguments.base))] if arguments.base else []) + folders
    model = load_pretrained(first, adapters=others)
    if model.adapter is not None:
        raise ValueError(f"{folders[-1]}: a {model.adapter.kind} adapter is no change of weights, so it does not merge")
    return model, load_tokenizer(tokenizer_folder(first, others)), folders[-1]


def torch_dtype(arguments: argparse.Namespace) -> torch.dtype:
    import torch

    chosen = arguments.dtype or DEFAULT[arguments.to]
    return getattr(torch, DTYPES.get(chosen, chosen))


def to_folder(model: GPT, tokenizer: TextTokenizer, part: Path, arguments: argparse.Namespace, run: Path) -> list[str]:
    from export.card import About, write_card
    from export.folder import write_folder

    write_folder(model, tokenizer, part, torch_dtype(arguments), arguments.max_shard_size)
    if arguments.to == "hf":
        name = arguments.push_to_hub or arguments.out.name
        write_card(model, run, part, About(name, arguments.license, tuple(arguments.language)))
    return []


def to_pth(model: GPT, tokenizer: TextTokenizer, part: Path, arguments: argparse.Namespace, run: Path) -> list[str]:
    from export.pth import write_pth

    return write_pth(model, part, torch_dtype(arguments))


def to_gguf(model: GPT, tokenizer: TextTokenizer, part: Path, arguments: argparse.Namespace, run: Path) -> list[str]:
    try:
        from export.gguf_file import write_gguf
    except ImportError:
        raise ValueError(
            '--to gguf needs the package gguf; install the extra "export": pip install -e ".[export]"'
        ) from None
    theirs = {name: short for short, name in DTYPES.items()}
    dtype = theirs.get(chosen := arguments.dtype or DEFAULT["gguf"], chosen)
    return write_gguf(model, tokenizer, part, dtype, arguments.out.stem)


WRITERS = {"gguf": to_gguf, "hf": to_folder, "pth": to_pth, "adapter_merged": to_folder}


def beside(tokenizer: TextTokenizer, path: Path, context: int) -> None:
    from export.modelfile import write_modelfile

    written = write_modelfile(tokenizer, path, context)
    if written:
        print(f"{written}: for Ollama, `ollama create {path.stem} -f {written}`")
    else:
        print("note: no Modelfile for Ollama: this model has no chat form that is the same in every round")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


if __name__ == "__main__":
    sys.exit(main())
