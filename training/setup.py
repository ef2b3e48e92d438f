"""What every entry script does before it trains: a config in; processes, tokenizer, model and data out."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
import xxhash

from dataset import DEFAULT_TOKENIZER, Loader, build_parts, load_tokenizer
from dataset.loader import ENDLESS, Rows, describe, fitting
from dataset.records import one_line
from dataset.tokenizer import HFTokenizer, TextTokenizer
from model import GPT, GPTConfig
from model.adapter_folder import is_adapter, tokenizer_folder
from model.config import check_writes, default_shape
from model.folder import folder_weights, weights_hash
from model.folder import load_config as load_model_config
from model.gpt import fresh_weights, with_score
from training import distributed
from training.adapting import adapted_weights, adapter_of, flags_of, newly_adapted
from training.command import run_stage as run_stage  # where tools look for it
from training.config import SHAPE_FLAGS, ChatConfig, Config, model_folder, rules
from training.distributed import World
from training.engines import Machine, Weights, engine_name, optimizer_name
from training.heap import prepare_heap
from training.objectives import STAGES
from training.optimizer import peak_rate
from training.split import check_micro_batches, check_shape, planned_micro_batches
from training.stages import DistillConfig
from training.teacher import Teacher

C = TypeVar("C", bound=Config)
STOPPED = "stopped by Ctrl-C; the same command begins again, or goes on from the newest checkpoint"
FOREIGN_ROW = 2048  # tokens a row, at most, that a model made elsewhere starts with unasked


def run(main: Callable[[C], None], asked: C) -> None:
    """Call main; see `run_stage`, which does so once the flags are checked."""
    try:
        main(asked)
    except KeyboardInterrupt:
        leave(STOPPED, 130)
    except (ValueError, OSError, RuntimeError) as error:
        text = one_line(error)
        if isinstance(error, RuntimeError):
            if (words := distributed.lost_contact(error)) is None:
                raise
            rank = torch.distributed.get_rank()
            text = f"rank {rank} lost contact with another rank ({words}); the one that ended first says why"
        leave(f"error: {text}", 2)
    finally:
        distributed.stop()


def leave(text: str, status: int) -> NoReturn:
    """Say why, and end. Other ranks may wait in a collective; they are not waited for, and the launcher stops them."""
    print(text, file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)


def start_machine(config: Config) -> Machine:
    """Meet the other processes, make sure that all were started alike, pick device and precision."""
    world = World.from_environment(config.tp, config.pp)
    device = distributed.pick_device(config.device, world)
    if device.type == "cpu":
        prepare_heap()
    alone = engine_name(config, world) == "single"
    check_micro_batches(config, planned_micro_batches(config, world.data_size))
    if not alone:
        distributed.start(world, device, min(distributed.FIRST_CONTACT, config.comm_timeout))
        alike = {f"--{name}": getattr(config, name) for name, rule in rules(config).items() if not rule.by_node}
        distributed.check_agreement(
            alike | {"torch": torch.__version__} | ({"processes on its node": world.local_size} if config.hsdp else {})
        )
    return Machine(world, device, distributed.pick_dtype(config.dtype, device))


@dataclass
class Start(Generic[C]):
    """What a run starts from. A config as asked may leave shapes open; here none is."""

    model: GPT  # on the meta device: shapes without memory
    weights: Weights
    tokenizer: TextTokenizer
    config: C  # as asked, every shape filled in; what config.yaml records
    max_seq_len: int  # tokens a row
    note: str = ""  # on max_seq_len, where nobody asked for one
    # what the starting folder holds, where `weights` are more: an adapter's first ones follow from seed and flags
    found: Weights | None = None


def starting_model(asked: C) -> Start[C]:
    """The model to train, its weights, its tokenizer, and the config with every shape filled in.

    Raises FileNotFoundError where the model of the stage before is missing, and ValueError where a shape flag
    contradicts the folder, the vocabulary is smaller than the tokenizer's, or nothing says how the model chats.
    """
    init = starting_folder(asked)
    folder_of_tokenizer = asked.tokenizer or (DEFAULT_TOKENIZER if init == "none" else tokenizer_folder(init))
    tokenizer = load_tokenizer(folder_of_tokenizer, asked.chat_template if isinstance(asked, ChatConfig) else None)
    if isinstance(asked, ChatConfig) and not tokenizer.has_chat_template:
        raise ValueError(
            f"{tokenizer.folder}: this tokenizer has no chat template, so nothing says how its model chats; give one "
            "with --chat_template chatml (or a Jinja file)"
        )
    shape, found = shape_and_weights(asked, init, tokenizer)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {shape.vocab_size}; "
            "give a larger --vocab_size, or the model's own --tokenizer"
        )
    adapter = adapter_of(asked, init, tokenizer, shape)
    weights = found if adapter is None else adapted_weights(adapter, init, shape, found, asked.seed)
    found = weights if is_adapter(init) else found
    with torch.device("meta"):
        model = GPT(shape, adapter)
    row, note = asked.max_seq_len or shape.max_seq_len, ""
    if init != "none" and asked.max_seq_len is None:
        row, note = inherited_row(init, shape.max_seq_len, tokenizer)
    filled: dict[str, Any] = {name: getattr(shape, name) for name in SHAPE_FLAGS} | flags_of(adapter)
    filled["optimizer"] = optimizer_name(asked, World.from_environment(asked.tp, asked.pp))
    config = replace(asked, init_from=init, max_seq_len=row, **filled)
    config = replace(config, learning_rate=peak_rate(config))
    return Start(model, weights, tokenizer, config, row, note, found)


def shape_and_weights(asked: Config, init: str, tokenizer: TextTokenizer) -> tuple[GPTConfig, Weights]:
    """Of the model that a run starts from: random, or that of a folder."""
    if init == "none":
        given = {name: getattr(asked, name) for name in (*SHAPE_FLAGS, "max_seq_len")}
        given = {name: value for name, value in given.items() if value is not None}
        size = default_shape(asked.dim or GPTConfig.dim, asked.n_heads) | {"vocab_size": tokenizer.vocab_size}
        shape = GPTConfig(**(size | given), dropout=asked.dropout, scores=asked.scores)
        return shape, partial(fresh_weights, shape, asked.seed)
    folder = load_model_config(init)
    check_shapes(asked, folder, init)
    # this run's dropout, and a longer context where --max_seq_len asks for it
    length = max(folder.max_seq_len, asked.max_seq_len or 0)
    shape = replace(folder, dropout=asked.dropout, max_seq_len=length, scores=asked.scores)
    weights = partial(folder_weights, init)
    if not asked.scores:
        check_writes(folder, init)
    # a head for the vocabulary gives way to one that scores; a reward model is gone on with
    return shape, weights if folder.scores == shape.scores else lambda: with_score(weights(), shape, asked.seed)


def inherited_row(init: str, context: int, tokenizer: TextTokenizer) -> tuple[int, str]:
    """Tokens a row where no flag says so, and how to tell it: the folder's context, which in a folder that was made
    elsewhere is what the model could read one day, and seldom what there is memory for."""
    row = min(context, FOREIGN_ROW) if isinstance(tokenizer, HFTokenizer) else context
    of = f" (of its context of {context:,})" if row < context else ""
    return row, f"rows of {row:,} tokens, from {init}{of}; --max_seq_len N changes it"


def starting_folder(config: Config) -> str:
    """Where a run starts: none, a folder, or a run by its name; if --init_from does not say, from the stage before."""
    if config.init_from == "none" or (config.init_from is None and config.previous is None):
        return "none"
    if config.init_from is not None:
        return str(model_folder(config.init_from, config.out_dir))
    folder = Path(config.out_dir) / f"{config.previous}_{config.dim or GPTConfig.dim}"
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise FileNotFoundError(
            f"{folder} is not there: run train_{config.previous}.py first, "
            "or give the model to start from with --init_from FOLDER_OR_RUN"
        )
    return str(folder)


def starting_teacher(start: Start[DistillConfig], machine: Machine) -> Teacher:
    """The frozen model to learn from.

    Raises FileNotFoundError where it is not there, and ValueError where none is named, where it has another vocabulary
    than the student, or a shorter context than a row.
    """
    config = start.config
    if config.teacher is None:
        raise ValueError("no teacher to learn from; give its model folder, or the name of its run, with --teacher")
    folder = model_folder(config.teacher, config.out_dir)
    shape, student = load_model_config(folder), f"the student {config.init_from or ''}"
    check_writes(shape, f"the teacher {folder}")
    if config.init_from == "none":
        student = f"the student (random weights, tokenizer {start.tokenizer.folder})"
    problem = other_vocabulary(load_tokenizer(tokenizer_folder(folder)), start.tokenizer)
    if not problem and shape.vocab_size != start.model.config.vocab_size:
        problem = f"{shape.vocab_size:,} rows of its embedding, and {start.model.config.vocab_size:,}"
    if problem:
        raise ValueError(
            f"the teacher {folder} has another vocabulary than {student}: {problem}. What a teacher says of a token is "
            "said of its number; give a --teacher of the same tokenizer, or --tokenizer and --init_from to fit it"
        )
    longest = start.model.config.max_seq_len if config.on_policy else start.max_seq_len
    if shape.max_seq_len < longest:
        told, way_out = f"rows are {longest:,}", f"give --max_seq_len {shape.max_seq_len}"
        if config.on_policy:
            told, way_out = f"the student draws answers in one of {longest:,}", "give a --teacher of a longer one"
        raise ValueError(f"the teacher {folder} has a context of {shape.max_seq_len:,} tokens, and {told}; {way_out}")
    weights = partial(folder_weights, folder)
    made_of = f"{weights_hash(weights)} {json.dumps(shape.to_hf(), sort_keys=True)}"
    identity = xxhash.xxh3_64_hexdigest(made_of.encode())
    return Teacher(shape, weights, identity, distributed.pick_compile(config.compile, machine.device))


def other_vocabulary(teacher: TextTokenizer, student: TextTokenizer) -> str:
    """Where two tokenizers first differ in what a token stands for, or "". How text becomes tokens is the student's
    matter alone."""
    if teacher.fingerprint == student.fingerprint:
        return ""
    sizes = teacher.vocab_size, student.vocab_size
    if sizes[0] != sizes[1]:
        return f"{sizes[0]:,} tokens, and {sizes[1]:,}"
    pairs = ((i, teacher.token_text(i), student.token_text(i)) for i in range(sizes[0]))
    return next((f"token {i} is {theirs!r}, and {ours!r}" for i, theirs, ours in pairs if theirs != ours), "")


def check_shapes(config: Config, folder: GPTConfig, init: str) -> None:
    for name in SHAPE_FLAGS:
        wanted, found = getattr(config, name), getattr(folder, name)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"--{name} {wanted} contradicts {init}, which has {name} {found}; "
                "leave the flag out, or give another --init_from"
            )


@dataclass
class Data:
    """Both parts, ready to be asked for updates."""

    train: Loader
    val: Loader | None

    @property
    def parts(self) -> list[Loader]:
        return [loader for loader in (self.train, self.val) if loader is not None]


def load_data(start: Start[Any], machine: Machine) -> Data:
    """Tokenize (or open the cache) and print what became of every row. Raises DataError, and ValueError for no data."""
    config, world = start.config, machine.world
    check_shape(config, start.model.config, world.parts(config.hsdp))  # for which no data need be read
    if world.rank == 0 and start.note:
        print(start.note, flush=True)
    train, val = load_parts(start, show=world.rank == 0)
    if world.rank == 0:
        print_table({"train": train, "val": val})
    if train is None:
        raise ValueError(f"{' '.join(config.data_path)}: no row is left to learn from; the table above says why")
    distributed.check_agreement(
        {
            "training data": train.encoded.fingerprint,
            "validation data": val.encoded.fingerprint if val else None,
        }
    )
    # at least a row: to a loader, 0 is a whole pass
    total = ENDLESS if config.max_steps else max(1, round(len(train) * config.epochs))
    update = min(total, config.global_batch_size or ENDLESS)
    batch_size = fitting(config.batch_size, update, world.data_size)
    if world.rank == 0:
        print("".join(f"{remark}\n" for remark in remarks(config, batch_size, update, val)), end="", flush=True)
    looked_at = min(len(val), config.eval_rows or len(val)) if val else 0
    share = partial(Loader, batch_size=batch_size, rank=world.data_rank, world_size=world.data_size)
    return Data(
        share(
            train, accumulation_steps=config.accumulation_steps, seed=config.seed, total_rows=total,
            rows_per_update=min(config.global_batch_size, total),
        ),
        share(val, total_rows=looked_at) if val else None,
    )  # fmt: skip


def load_parts(start: Start[Any], show: bool) -> tuple[Rows | None, Rows | None]:
    """Rows to learn from, and those held out. `show`: whether to say how far the reading is."""
    config = start.config
    build = partial(
        build_parts,
        STAGES[config.stage].form_for(config),
        tokenizer=start.tokenizer,
        max_seq_len=start.max_seq_len,
        on_bad_row=config.on_bad_row,
        cache_dir=config.cache_dir,
        show=show,
    )
    if config.val_path:
        return build(config.data_path)["all"], build(config.val_path)["all"]
    part = "train" if config.val_fraction else "all"
    parts = build(config.data_path, part=part, val_fraction=config.val_fraction)
    return parts[part], parts.get("val")


def remarks(config: Config, batch_size: int, update: int, val: Rows | None) -> Iterator[str]:
    """What was asked for and does not happen, for so much data."""
    if batch_size < config.batch_size:
        yield (
            f"--batch_size {config.batch_size:,} is taken as {batch_size:,}: "
            f"an update holds {update:,} rows over all processes"
        )
    if val is None and (config.val_path or config.val_fraction):
        asked = "--val_path" if config.val_path else f"--val_fraction {config.val_fraction:g}"
        yield f"no validation: {asked} gives no row; a larger --val_fraction or other --val_path files do"


def print_table(parts: dict[str, Rows | None]) -> None:
    from rich.console import Console  # on one rank alone
    from rich.table import Table

    header, lines, notes = describe(parts)
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in lines:
        table.add_row(*line)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def run_identity(start: Start[Any], data: Data) -> dict[str, Any]:
    """What a checkpoint must share with a run to continue it exactly: data, start, and the flags that say so."""
    config = start.config
    return {
        "stage": config.stage,
        "data": data.train.rows.fingerprint,
        "init_from": "none" if config.init_from == "none" else hash_of(start),
    } | {name: getattr(config, name) for name, rule in rules(config).items() if rule.resume == "refuse"}


def hash_of(start: Start[Any]) -> str:
    """Of the weights in the starting folder; a new adapter has looked at them already."""
    adapter = start.model.adapter
    if adapter is not None and newly_adapted(start.model, start.config.init_from):
        return adapter.base_hash
    return weights_hash(start.found or start.weights)
