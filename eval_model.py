"""Talk to a model, or score it on files.

python eval_model.py                                               the newest out/full_sft_*
python eval_model.py --model_mode 1 --n_layers 16 --dim 768        0 pretrain, 1 full_sft, 2 dpo: out/full_sft_768
python eval_model.py --model FOLDER --prompt "Who are you?"        one answer of any Llama- or Qwen3-family folder
python eval_model.py --adapter FOLDER                              an adapter on its base; several are merged in order
python eval_model.py --score val.jsonl pairs.jsonl --json          loss, bits per byte, exact match, preferences
python eval_model.py --model out/reward_512 --score pairs.jsonl    a reward model: accuracy by kind of pair, calibration
python eval_model.py --benchmark mmlu.jsonl lambada.jsonl          accuracy beside chance; under torchrun ranks share it
python eval_model.py --compare full_sft_512 dpo_512 --benchmark mmlu.jsonl     two models on the same items and prompts

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from training.command import slow_imports
from training.config import SHAPE_FLAGS, Config, Parser, convert, model_folder, plain, rules, stage_of
from training.names import flags_among, unknown_names

if (
    typing.TYPE_CHECKING
):  # imported where they are used: torch takes seconds, and neither --help nor a wrong flag needs it
    from dataset import TextTokenizer
    from evaluation.benchmark import Run
    from model import GPT, GPTConfig
    from serving import Notice, Sampling, Session
    from training.distributed import World

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
        from model.generate import check_arguments
        from serving import Session
        from training import distributed

    # 1. Questions with known answers: processes under a launcher share them
    if arguments.benchmark or arguments.compare:
        world = distributed.World.from_environment()
        (compare if arguments.compare else benchmark)(arguments, world)
        distributed.stop()
        return

    # 2. Which model
    opened = open_model(arguments, distributed.World())
    if arguments.score:
        score(opened, arguments)
        return

    # 3. Answer once, or talk
    check_arguments(opened.model, [[0]], **sampling(arguments))
    session = Session(
        opened.model, opened.tokenizer, sampling(arguments), arguments.seed, arguments.system, not opened.chats, tell
    )
    if arguments.prompt is not None:
        for text in arguments.prompt:
            show(session, text)
    elif sys.stdin.isatty():
        talk(session)
    else:
        speak_utf8(sys.stdin, errors=None)
        for line in sys.stdin:
            if line.strip():
                show(session, line.rstrip("\r\n"))


class Opened(typing.NamedTuple):
    """A model as the flags mean it."""

    model: GPT
    tokenizer: TextTokenizer
    chats: bool  # whether it is asked through its chat template, or continues texts
    folder: Path  # of the last adapter, where there are some
    name: str


def open_model(arguments: argparse.Namespace, world: World, name: str | None = None) -> Opened:
    """The model of this name, or else the one that the flags mean; says which it is."""
    from dataset import load_tokenizer
    from model import load_config, load_pretrained
    from model.adapter_folder import tokenizer_folder
    from training.distributed import pick_to_answer

    adapters = [model_folder(each, arguments.out_dir) for each in arguments.adapter]
    if name is not None:
        folder = model_folder(name, arguments.out_dir)
    else:
        folder = adapters.pop(0) if adapters and not arguments.model else find_folder(arguments)
    check_shape(arguments, load_config(folder), folder)
    device, dtype = pick_to_answer(arguments.device, arguments.dtype, world)
    model = load_pretrained(folder, device, dtype, adapters)
    tokenizer = load_tokenizer(tokenizer_folder(folder, adapters))
    stacked = [folder, *adapters]
    called = " + ".join(map(str, stacked))
    if world.rank == 0:
        say(
            f"{called}: {model.num_parameters() / 1e6:.1f} M parameters, "
            f"context {model.config.max_seq_len}, on {device} in {str(dtype).removeprefix('torch.')}"
        )
    text_alone = arguments.raw or (stage_of(stacked[-1]) == "pretrain" and not arguments.chat)
    return Opened(model, tokenizer, tokenizer.has_chat_template and not text_alone, stacked[-1], called)


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
    talking.add_argument("--prompt", nargs="+", metavar="TEXT", help="answer this and leave; of several, one by one")
    talking.add_argument("--system", metavar="TEXT", help="system prompt")
    talking.add_argument(
        "--raw", action="store_true", help="continue the text instead of chatting (pretrained models do)"
    )
    talking.add_argument("--chat", action="store_true", help="ask a pretrained model through the chat template")
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
    scoring.add_argument("--json", action="store_true", help="JSON on stdout instead of tables")
    judging = parser.add_argument_group("benchmarks (docs/evaluation.md)")
    judging.add_argument("--benchmark", nargs="+", metavar="FILE.jsonl", help="accuracy on questions, beside chance")
    judging.add_argument("--shots", type=int, default=0, help="examples before a question, of X.fewshot.jsonl [0]")
    judging.add_argument("--subjects", action="store_true", help="a table of subjects too")
    judging.add_argument("--compare", nargs=2, metavar=("A", "B"), help="models, or two files benchmark.json")
    judging.add_argument("--out", metavar="DIR", help="where benchmark.json and benchmark.png go [the model's folder]")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(unknown_names(flags_among(unknown), list(vars(arguments)), "flag", "--", tuple(rules(Config))))
    check_flags(arguments)
    return arguments


def check_flags(given: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    judged, saved = given.benchmark or given.compare, saved_runs(given)
    if given.score and (given.prompt is not None or judged):
        raise ValueError("--score is one thing to do, --prompt, --benchmark and --compare are others; give one of them")
    if given.benchmark and given.prompt is not None and not given.compare:
        raise ValueError("--benchmark and --prompt are two different things to do; give one of them, or --compare A B")
    if not given.score and (given.reference or (given.json and not judged)):
        raise ValueError("--reference belongs to --score FILE.jsonl, --json to that, --benchmark and --compare")
    if not judged and (given.shots or given.subjects or given.out):
        raise ValueError("--shots, --subjects and --out belong to --benchmark FILE.jsonl and --compare A B")
    if given.compare and (given.model or given.adapter):
        raise ValueError("--compare A B names both models; leave --model and --adapter out")
    if saved and (given.benchmark or given.prompt):
        raise ValueError(f"--compare {given.compare[0]} is a file of scores, which cannot be asked; give model folders")
    if given.raw and given.chat:
        raise ValueError("--raw and --chat say the opposite of each other; give one of them")
    if given.batch_size < 1 or given.max_rows < 0 or given.shots < 0:
        raise ValueError("--batch_size must be at least 1, and --max_rows and --shots at least 0")


def saved_runs(given: argparse.Namespace) -> bool:
    return bool(given.compare) and any(name.endswith(".json") for name in given.compare)


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


def score(opened: Opened, arguments: argparse.Namespace) -> None:
    """Print what was measured on each file. Pictures go into the model's folder."""
    from evaluation import score_file, tables
    from model import load_pretrained

    model, tokenizer, reference, results = opened.model, opened.tokenizer, None, []
    if arguments.reference:
        if model.config.scores:
            raise ValueError("--reference is what DPO started from, and a reward model has none; leave it out")
        weight = model.head_weight
        reference = load_pretrained(model_folder(arguments.reference, arguments.out_dir), weight.device, weight.dtype)
    for path in arguments.score:
        result = score_file(
            model, tokenizer, path, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens,
            max_rows=arguments.max_rows, reference=reference, plots=opened.folder if model.config.scores else None,
        )  # fmt: skip
        if arguments.json:
            put([], result, as_json=True)
        results.append(result)
    if not arguments.json:
        put([tables.of_files(results)], {}, as_json=False)


def put(shown: Sequence[object], value: dict[str, object], as_json: bool) -> None:
    """On stdout: tables and lines, or one JSON object."""
    from rich.console import Console

    if as_json:
        print(json.dumps(value, ensure_ascii=False), flush=True)
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for each in shown:
        console.print(each, markup=False, highlight=False, soft_wrap=isinstance(each, str))


# Benchmarks -----------------------------------------------------------------------------------------------------


def judged(opened: Opened, arguments: argparse.Namespace, world: World) -> Run:
    """What the model gets right of --benchmark FILES; the same on every rank."""
    from evaluation.benchmark import How, judge_files
    from evaluation.likelihood import Ranks
    from model.config import check_writes
    from training import distributed

    check_writes(opened.model.config, opened.name)
    if world.launcher is not None:
        distributed.start(world, opened.model.head_weight.device)
    how = How(opened.chats, arguments.shots, arguments.batch_size, arguments.max_new_tokens, arguments.max_rows)
    ranks = Ranks(world.rank, world.size, distributed.gather)
    return judge_files(opened.model, opened.tokenizer, arguments.benchmark, how, name=opened.name, ranks=ranks)


def benchmark(arguments: argparse.Namespace, world: World) -> None:
    """Print scores, and leave them with every item in benchmark.json, and as a picture beside it."""
    from evaluation import tables

    opened = open_model(arguments, world)
    run = judged(opened, arguments, world)
    if world.rank == 0:
        put(tables.of_benchmark(run, arguments.subjects), run.summary(), arguments.json)
        left = run.leave(Path(arguments.out or opened.folder))
        say(f"every item, and a picture: {', '.join(map(str, left))}")


def compare(arguments: argparse.Namespace, world: World) -> None:
    """Print two models' scores and answers side by side; --out DIR keeps them."""
    from evaluation import tables
    from evaluation.comparison import Comparison, prompts_for, read_run

    if saved_runs(arguments):
        found = Comparison.of_runs(*map(read_run, arguments.compare))
    else:
        both = [open_model(arguments, world, name) for name in arguments.compare]
        runs = [judged(each, arguments, world) for each in both] if arguments.benchmark else []
        if world.rank:
            return
        found = Comparison.of_runs(*runs) if runs else Comparison(list(arguments.compare))
        prompts = arguments.prompt or prompts_for(all(each.chats for each in both))
        found.ask([each[:3] for each in both], prompts, arguments.max_new_tokens)
    put(tables.of_comparison(found), found.summary(), arguments.json)
    if arguments.out:
        say(f"every item and answer: {', '.join(map(str, found.leave(Path(arguments.out))))}")


if __name__ == "__main__":
    sys.exit(main())
