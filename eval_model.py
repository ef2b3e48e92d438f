"""Talk to a model, or score it on files.

python eval_model.py                                               the newest out/full_sft_*
python eval_model.py --model_mode 1 --n_layers 16 --dim 768        0 pretrain, 1 full_sft, 2 dpo: out/full_sft_768
python eval_model.py --model FOLDER --prompt "Who are you?"        one answer of any Llama- or Qwen3-family folder
python eval_model.py --adapter FOLDER                              an adapter on its base; several are merged in order
python eval_model.py --score val.jsonl pairs.jsonl --json          loss, bits per byte, exact match, preferences
python eval_model.py --model out/reward_512 --score pairs.jsonl    a reward model: accuracy by kind of pair, calibration

Answers go to stdout, everything else to stderr, so `echo "Hi" | python eval_model.py > answers.txt` holds answers \
alone.
Tool calls that a model writes are shown; nothing here runs them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import locale
import os
import re
import sys
import typing
from functools import partial
from pathlib import Path

from training.command import slow_imports
from training.config import SHAPE_FLAGS, Config, Parser, convert, model_folder, plain, rules, stage_of
from training.names import flags_among, unknown_names

if (
    typing.TYPE_CHECKING
):  # imported where they are used: torch takes seconds, and neither --help nor a wrong flag needs it
    from dataset import TextTokenizer
    from evaluation import Result
    from model import GPT, GPTConfig
    from serving import Notice, Sampling, Session

WEIGHTS = ("adapter_model.safetensors", "model.safetensors")  # of a run that trained an adapter, or a whole model
FOLDER_FLAGS = (*SHAPE_FLAGS, "max_seq_len")  # must agree with the folder's config.json where they are given

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt (without TEXT: remove it)
/save FILE     append the conversation to FILE, as a row to train on
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C stops an answer"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user did wrong."""
    for output in (sys.stdout, sys.stderr):
        speak_utf8(output)
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def speak_utf8(stream: typing.TextIO, errors: str | None = "replace") -> None:
    """Whatever the locale says; a stream that someone put in place of the process's own is left as it is."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=errors)


def run(arguments: argparse.Namespace) -> None:
    with slow_imports():
        from dataset import load_tokenizer
        from model import load_config, load_pretrained
        from model.adapter_folder import tokenizer_folder
        from model.generate import check_arguments
        from serving import Session
        from training.distributed import World, pick_device, pick_dtype

    # 1. Which folder
    adapters = [model_folder(name, arguments.out_dir) for name in arguments.adapter]
    folder = adapters.pop(0) if adapters and not arguments.model else find_folder(arguments)
    check_shape(arguments, load_config(folder), folder)

    # 2. Model and tokenizer
    device = pick_device(arguments.device, World())
    # the CPU stays at full precision unless asked: its answers do not depend on the machine then
    dtype = pick_dtype("float32" if (arguments.dtype, device.type) == ("auto", "cpu") else arguments.dtype, device)
    model = load_pretrained(folder, device, dtype, adapters)
    tokenizer = load_tokenizer(tokenizer_folder(folder, adapters))
    stacked = [folder, *adapters]
    say(
        f"{' + '.join(map(str, stacked))}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"context {model.config.max_seq_len}, on {device} in {str(dtype).removeprefix('torch.')}"
    )

    # 3. Score, answer once, or talk
    if arguments.score:
        reference = None
        if arguments.reference:
            if model.config.scores:
                raise ValueError("--reference is what DPO started from, and a reward model has none; leave it out")
            reference = load_pretrained(model_folder(arguments.reference, arguments.out_dir), device, dtype)
        score(model, tokenizer, reference, arguments, folder)
        return
    check_arguments(model, [[0]], **sampling(arguments))
    raw = arguments.raw or stage_of(stacked[-1]) == "pretrain" or not tokenizer.has_chat_template
    session = Session(model, tokenizer, sampling(arguments), arguments.seed, arguments.system, raw, notice=tell)
    if arguments.prompt is not None:
        show(session, arguments.prompt)
    elif sys.stdin.isatty():
        talk(session)
    else:
        speak_utf8(sys.stdin, errors=None)
        for line in sys.stdin:
            if line.strip():
                show(session, line.rstrip("\r\n"))


# Flags ----------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for unknown flags, saying what each is called here, and for flags that do not go together."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    which = parser.add_argument_group("which model")
    which.add_argument("--model_mode", type=int, choices=(0, 1, 2), default=1, help="0 pretrain, 1 full_sft, 2 dpo [1]")
    which.add_argument("--out_dir", default="out", help="where run folders live [out]")
    which.add_argument(
        "--model",
        metavar="FOLDER",
        help="open this instead: a run in out_dir by its name, or any Llama or Qwen3 folder",
    )
    which.add_argument(
        "--adapter", nargs="+", default=[], metavar="FOLDER", help="these on it, or on the first one's base"
    )
    add_shapes(which, parser.add_argument_group("shape, checked against the folder's config.json"))
    which.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    which.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[auto]")
    talking = parser.add_argument_group("talking")
    talking.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    talking.add_argument("--system", metavar="TEXT", help="system prompt")
    talking.add_argument(
        "--raw", action="store_true", help="continue the text instead of chatting (pretrained models do)"
    )
    talking.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, tokens [256]")
    talking.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token [0.7]")
    talking.add_argument("--top_k", type=int, default=0, help="of the k likeliest tokens, 0: of all [0]")
    talking.add_argument("--top_p", type=float, default=0.9, help="of the likeliest that make up this share [0.9]")
    talking.add_argument("--repetition_penalty", type=float, default=1.0, help="1: none [1]")
    talking.add_argument("--seed", type=int, help="makes answers repeatable")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--score", nargs="+", metavar="FILE.jsonl", help="measure the model on these rows")
    scoring.add_argument("--reference", metavar="FOLDER", help="for preference rows: the model that DPO started from")
    scoring.add_argument("--batch_size", type=int, default=16, help="rows at a time [16]")
    scoring.add_argument("--max_rows", type=int, default=0, help="only the first rows of a file, 0: all [0]")
    scoring.add_argument("--json", action="store_true", help="one JSON object a file instead of a table")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(unknown_names(flags_among(unknown), list(vars(arguments)), "flag", "--", tuple(rules(Config))))
    if arguments.score and arguments.prompt is not None:
        raise ValueError("--score and --prompt are two different things to do; give one of them")
    if not arguments.score and (arguments.json or arguments.reference):
        raise ValueError("--json and --reference belong to --score FILE.jsonl")
    if arguments.batch_size < 1 or arguments.max_rows < 0:
        raise ValueError("--batch_size must be at least 1 and --max_rows at least 0")
    return arguments


def add_shapes(which: argparse._ArgumentGroup, checked: argparse._ArgumentGroup) -> None:
    """Training's shape flags. --dim finds the folder as well; the others are only checked, so a line may be reused."""
    hints = typing.get_type_hints(Config)
    for name in FOLDER_FLAGS:
        kind = partial(convert, kind=hints[name], name=f"--{name}")
        group, shown = (
            (which, "width: open {stage}_{dim}, not the newest")
            if name == "dim"
            else (checked, rules(Config)[name].help)
        )
        group.add_argument(f"--{name}", type=kind, metavar=plain(hints[name]).__name__, help=shown)


def find_folder(arguments: argparse.Namespace) -> Path:
    """The model folder that the flags mean. Raises FileNotFoundError with what to run or to give."""
    from training import STAGES

    if arguments.model:
        return model_folder(arguments.model, arguments.out_dir)
    out_dir, stage = Path(arguments.out_dir), list(STAGES)[arguments.model_mode]
    weights = {p.parent: p for name in WEIGHTS for p in out_dir.glob(f"*/{name}")}
    trained = set(weights)
    wanted = out_dir / f"{stage}_{arguments.dim or '*'}"
    name = re.compile(rf"{stage}_{arguments.dim or r'[0-9]+'}")
    found = sorted((p for p in trained if name.fullmatch(p.name)), key=lambda p: weights[p].stat().st_mtime)
    if found:
        return found[-1]
    there = ", ".join(sorted(p.name for p in trained)) or "none"
    dim = f" --dim {arguments.dim}" if arguments.dim else ""
    raise FileNotFoundError(
        f"{wanted}/model.safetensors is not there (models in {out_dir}: {there}): run "
        f"`python {STAGES[stage].script}{dim}` first, or give another --model_mode (0 pretrain, 1 full_sft, 2 dpo), "
        "--dim or --out_dir, or --model FOLDER_OR_RUN"
    )


def check_shape(arguments: argparse.Namespace, config: GPTConfig, folder: Path) -> None:
    """Raise ValueError for a shape flag that is not what config.json says."""
    for name in FOLDER_FLAGS:
        given, found = getattr(arguments, name), getattr(config, name)
        if given is not None and given != found:
            raise ValueError(
                f"--{name} {given} contradicts {folder}/config.json, which has {name} {found}; leave it out"
            )


def sampling(arguments: argparse.Namespace) -> Sampling:
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "repetition_penalty": arguments.repetition_penalty,
    }


# Talking --------------------------------------------------------------------------------------------------------


def show(session: Session, text: str) -> None:
    with contextlib.closing(session.answer(text)) as parts:  # closed also by Ctrl-C: what came is kept
        for part in parts:
            print(part, end="", flush=True)
    print(flush=True)


def say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def tell(notice: Notice) -> None:
    """What a session has to say beside its answers, in words."""
    from serving import ContextFull

    if isinstance(notice, ContextFull):
        say(f"[context full: the {notice.left_out} oldest messages are left out from here on]")
    elif notice.limit == "max_new_tokens":
        say(f"\n[cut: --max_new_tokens {notice.tokens}]")
    else:
        say(f"\n[cut: context of {notice.tokens} tokens full]")


def talk(session: Session) -> None:
    """Read messages and commands from a terminal until /exit or Ctrl-D."""
    edit_lines()
    say("continuing texts; /help lists commands" if session.raw else "chatting; /help lists commands")
    while True:
        try:
            print()
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            say("\n[Ctrl-D or /exit leaves]")
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                command(session, line)
            elif line:
                show(session, line)
        except KeyboardInterrupt:
            say("\n[stopped]")
        except (ValueError, OSError) as error:
            say(f"error: {error}")


def edit_lines() -> None:
    """Give input() line editing and history. What is pasted is one message, whatever lines it has, and every UTF-8
    character can be typed, whatever the locale says."""
    speak_utf8(sys.stdin)
    if locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX"):
        with contextlib.suppress(locale.Error):  # readline asks the environment how many bytes a character has
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
            os.environ["LC_ALL"] = "C.UTF-8"
    with contextlib.suppress(ImportError):  # Windows has line editing built in
        import readline

        # where there is no such locale, a byte beyond ASCII is still no command (Alt-? would list the folder)
        for setting in ("enable-bracketed-paste on", "input-meta on", "output-meta on", "convert-meta off"):
            readline.parse_and_bind(f"set {setting}")


def command(session: Session, line: str) -> None:
    """Do one /command. Raises ValueError for one that there is not, OSError where a file cannot be written."""
    name, _, text = line.partition(" ")
    if name == "/reset":
        session.messages, session.forgotten = [], 0
        say("[conversation forgotten]")
    elif name == "/system":
        session.system = text.strip() or None
        say("[system prompt set]" if session.system else "[system prompt removed]")
    elif name == "/save":
        if not text.strip() or not session.messages:
            raise ValueError("/save needs a file name, and a conversation to save")
        row = {"conversations": session.conversation()}
        path = Path(text.strip()).expanduser()
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        say(f"[appended to {path}]")
    elif name == "/help":
        say(HELP)
    else:
        raise ValueError(f"there is no command {name}; /help lists them")


# Scoring --------------------------------------------------------------------------------------------------------


def score(
    model: GPT, tokenizer: TextTokenizer, reference: GPT | None, arguments: argparse.Namespace, folder: Path
) -> None:
    """Print what was measured on each file. Pictures go into the model's folder."""
    from evaluation import score_file

    results = []
    for path in arguments.score:
        result = score_file(
            model, tokenizer, path, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
            max_rows=arguments.max_rows, reference=reference, plots=folder if model.config.scores else None,
        )  # fmt: skip
        if arguments.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        results.append(result)
    if not arguments.json:
        print_table(results)


def print_table(results: list[Result]) -> None:
    """One column a file, one line a number."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(Path(result["file"]).name for result in results))
    for column in table.columns[1:]:
        column.justify = "right"
    names = dict.fromkeys(name for result in results for name in result if name != "file")
    for name in names:
        table.add_row(name.replace("_", " "), *(shown(result.get(name)) for result in results))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def shown(value: object) -> str:
    if isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values()):
        return "\n".join(
            f"{kind}: {each['accuracy']:.1%} of {each['pairs']} "
            f"({each['accuracy_low']:.1%} to {each['accuracy_high']:.1%})"
            for kind, each in value.items()
        )
    if isinstance(value, dict):
        return "\n".join(f"{count:,} {reason}" for reason, count in value.items()) or "0"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")


if __name__ == "__main__":
    sys.exit(main())
