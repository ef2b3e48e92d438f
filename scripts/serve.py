"""Serve models over the OpenAI API, with a page to chat at http://127.0.0.1:8000/.

python scripts/serve.py --model full_sft_512                          a run in out_dir, or any Llama or Qwen3 folder
python scripts/serve.py --model before=out/full_sft_512 after=out/dpo_512      two, side by side
SEEDLING_API_KEY=KEY python scripts/serve.py --model full_sft_512 --host 0.0.0.0

docs/serving.md says what is answered and what is limited. Ctrl-C stops it, and lets what runs come to its end.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.command import slow_imports
from training.config import Parser, model_folder, stage_of
from training.names import flags_among, unknown_names

if TYPE_CHECKING:  # imported where they are used: torch takes seconds, and neither --help nor a wrong flag needs it
    from model import GPT
    from serving.engine import Engine, Served


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ValueError for flags that are unknown, out of range or do not go together."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]FOLDER", help="folders, or runs in out_dir by their names")
    add("--out_dir", default="out", help="where run folders live [out]")
    add("--host", default="127.0.0.1", help="address to listen at; another than this machine's own needs a key")
    add("--port", type=int, default=8000, help="0: any that is free [8000]")
    add("--api_key", default=os.environ.get("SEEDLING_API_KEY"), help="asked of every client [$SEEDLING_API_KEY]")
    add("--slots", type=int, default=16, help="answers generated at a time, of each model [16]")
    add("--context", type=int, help="most tokens of a prompt and its answer [the model's]")
    add("--max_waiting", type=int, default=64, help="answers that may wait for a slot [64]")
    add("--max_body_bytes", type=int, default=1 << 20, help="of a request [1048576]")
    add("--max_seconds", type=float, default=600, help="a request may take, waiting included [600]")
    add("--stop_seconds", type=float, default=30, help="what runs may take when the server is stopped [30]")
    add("--threads", type=int, help="that compute [all cores]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[auto; float32 on a CPU]")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(unknown_names(flags_among(unknown), list(vars(arguments)), "flag", "--"))
    for name in ("slots", "context", "max_body_bytes", "max_seconds", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if arguments.max_waiting < 0 or arguments.stop_seconds < 0:
        raise ValueError("--max_waiting and --stop_seconds must be at least 0")
    if not arguments.api_key and not is_loopback(arguments.host):
        raise ValueError(f"--host {arguments.host} lets others in; give --api_key KEY, or set SEEDLING_API_KEY")
    return arguments


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a stop, 130 after Ctrl-C before it listens, or 2 with one line on stderr for what the user
    did wrong."""
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        print(
            f'error: a server needs {missing.name}; install the extra "serve": pip install -e ".[serve]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    with slow_imports():
        import torch

        from serving.app import create_app
        from serving.guard import Limits
        from serving.run import listen
    models = load(arguments)
    if arguments.threads:  # after the device was picked, which has an opinion on this
        torch.set_num_threads(arguments.threads)
    app = create_app(
        models, api_key=arguments.api_key, slots=arguments.slots, context=arguments.context,
        max_waiting=arguments.max_waiting, limits=Limits(arguments.max_body_bytes, arguments.max_seconds),
        stop_seconds=arguments.stop_seconds,
    )  # fmt: skip
    tell(app.state.engine)
    listen(app, arguments.host, arguments.port, arguments.stop_seconds)


def tell(engine: Engine) -> None:
    """What is served, and the memory that is taken for it."""
    for name, batch in engine.batches.items():
        parameters, slots = batch.served.model.num_parameters() / 1e6, batch.slots
        print(
            f"{name}: {parameters:.1f} M parameters; {len(slots.held)} slots of {batch.context} tokens, "
            f"a cache of {slots.cache_bytes:,} bytes",
            flush=True,
        )


def load(arguments: argparse.Namespace) -> list[Served]:
    """Raises ValueError for a folder that cannot be served, and for two of one name."""
    from dataset import load_tokenizer
    from model import load_pretrained
    from model.adapter_folder import tokenizer_folder
    from model.config import check_writes
    from serving.engine import Served
    from training.distributed import pick_to_answer

    device, dtype = pick_to_answer(arguments.device, arguments.dtype)
    found: dict[str, Served] = {}
    for typed in arguments.model:
        name, _, given = typed.rpartition("=")
        folder = model_folder(given, arguments.out_dir)
        name = name or folder.resolve().name
        if name in found:
            raise ValueError(f"--model has two of the name {name}; give one another name: OTHER={given}")
        model, tokenizer = load_pretrained(folder, device, dtype), load_tokenizer(tokenizer_folder(folder))
        check_writes(model.config, str(folder))
        check_memory(model, arguments)
        chat = stage_of(folder) != "pretrain" and tokenizer.has_chat_template
        found[name] = Served(name, model.eval(), tokenizer, chat)
    return list(found.values())


def check_memory(model: GPT, arguments: argparse.Namespace) -> None:
    """Raise ValueError where this machine's memory has no room for the cache; a card says so by itself."""
    from model.slots import cache_bytes

    if model.head_weight.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    needed = cache_bytes(model, arguments.slots, min(arguments.context or sys.maxsize, model.config.max_seq_len))
    there = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{arguments.slots} slots of this model's context need {needed:,} bytes, and {there:,} are free: give "
            "--context, or fewer --slots"
        )


if __name__ == "__main__":
    sys.exit(main())
