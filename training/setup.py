"""What every entry script does before it trains: a config in; processes, tokenizer, model and data out."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from rich.console import Console
from rich.table import Table

from dataset import DEFAULT_TOKENIZER, Loader, build_rows, load_tokenizer
from dataset.loader import PairRows, Rows, describe
from model import GPT, GPTConfig
from model.folder import folder_weights
from model.folder import load_config as load_model_config
from model.gpt import fresh_weights
from training import distributed
from training.config import SHAPE_FLAGS, Config, load_config
from training.distributed import World
from training.engines import SingleEngine, Weights, engine_name
from training.objectives import sequence_logps

C = TypeVar("C", bound=Config)


def run_stage(main: Callable[[Any], None], cls: type[Config]) -> None:
    """Parse flags and call main; what a user did wrong is one line, not a traceback. Exits with 2 then."""
    try:
        main(load_config(cls))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError):
            if not distributed.is_lost_contact(error):
                raise
            rank = torch.distributed.get_rank()
            text = f"rank {rank} lost contact with another rank ({text.splitlines()[0]}); the one that ended first says why"
        print(f"error: {text}", file=sys.stderr)
        sys.stderr.flush()
        # the other ranks may wait in a collective; leave without waiting for them, and the launcher stops them
        os._exit(2) if torch.distributed.is_initialized() else sys.exit(2)
    finally:
        distributed.stop()


@dataclass
class Machine:
    """Where this process runs."""

    world: World
    device: torch.device
    dtype: torch.dtype


def start_machine(config: Config) -> Machine:
    """Meet the other processes, make sure that all were started alike, pick device and precision."""
    world = World.from_environment()
    device = distributed.pick_device(config.device, world)
    if engine_name(config, world) != "single":
        distributed.start(world, device, min(distributed.FIRST_CONTACT, config.comm_timeout))
        # folders and the device's name may differ from node to node
        own = {
            "data_path",
            "val_path",
            "cache_dir",
            "out_dir",
            "init_from",
            "tokenizer",
            "offload_dir",
            "device",
            "deepspeed_config",
        }
        distributed.check_agreement(
            {f"--{name}": value for name, value in asdict(config).items() if name not in own}
            | {"torch": torch.__version__}
            | ({"processes on its node": world.local_size} if config.hsdp else {})
        )
    return Machine(world, device, distributed.pick_dtype(config.dtype, device))


def starting_model(config: C) -> tuple[GPT, Weights, Any, C]:
    """The model to train on the meta device (shapes without memory), its weights, its tokenizer, and the config with
    every shape filled in.

    Raises FileNotFoundError where the model of the stage before is missing, and ValueError where a shape flag
    contradicts the folder or the vocabulary is smaller than the tokenizer's.
    """
    init = config.init_from or starting_folder(config)
    tokenizer = load_tokenizer(config.tokenizer or (DEFAULT_TOKENIZER if init == "none" else init))
    if init == "none":
        given = {
            name: getattr(config, name) for name in (*SHAPE_FLAGS, "max_seq_len") if getattr(config, name) is not None
        }
        shape = GPTConfig(**({"vocab_size": tokenizer.vocab_size} | given), dropout=config.dropout)
        weights: Weights = partial(fresh_weights, shape, config.seed)
    else:
        folder = load_model_config(init)
        check_shapes(config, folder, init)
        # this run's dropout, and a longer context where --max_seq_len asks for it
        length = max(folder.max_seq_len, config.max_seq_len or 0)
        shape = replace(folder, dropout=config.dropout, max_seq_len=length)
        weights = partial(folder_weights, init, folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {shape.vocab_size}; give a larger --vocab_size, or the model's own --tokenizer"
        )
    with torch.device("meta"):
        model = GPT(shape)
    shapes = {name: getattr(shape, name) for name in SHAPE_FLAGS}
    length = config.max_seq_len or shape.max_seq_len
    return model, weights, tokenizer, replace(config, init_from=init, max_seq_len=length, **shapes)


def starting_folder(config: Config) -> str:
    """Where a stage starts if --init_from does not say: none, or the folder of the stage before."""
    if config.previous is None:
        return "none"
    folder = Path(config.out_dir) / f"{config.previous}_{config.dim or GPTConfig.dim}"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not there: run train_{config.previous}.py first, or give the model to start from with --init_from FOLDER"
        )
    return str(folder)


def check_shapes(config: Config, folder: GPTConfig, init: str) -> None:
    for name in SHAPE_FLAGS:
        wanted, found = getattr(config, name), getattr(folder, name)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"--{name} {wanted} contradicts {init}, which has {name} {found}; leave the flag out, or give another --init_from"
            )


@dataclass
class Data:
    """Packed rows of both parts."""

    train: Rows
    val: Rows | None


def load_data(config: Config, tokenizer: Any, world: World) -> Data:
    """Tokenize (or open the cache) and print what became of every row. Raises DataError, and ValueError for no data."""
    assert config.max_seq_len is not None
    fraction = 0.0 if config.val_path else config.val_fraction

    def build(path: list[str], part: str) -> Rows | None:
        stage: Any = config.stage
        return build_rows(
            stage,
            path,
            tokenizer,
            config.max_seq_len or 0,
            part=part,
            val_fraction=fraction,
            on_bad_row=config.on_bad_row,
            cache_dir=config.cache_dir,
        )

    train = build(config.data_path, "train" if fraction else "all")
    val = build(config.val_path, "all") if config.val_path else build(config.data_path, "val") if fraction else None
    if world.rank == 0:
        print_table({"train": train, "val": val})
    if train is None:
        raise ValueError(f"{' '.join(config.data_path)}: no row is left to learn from; the table above says why")
    parts = {"training data": train.encoded.fingerprint, "validation data": val.encoded.fingerprint if val else None}
    distributed.check_agreement(parts)
    return Data(train, val)


def print_table(parts: dict[str, Rows | None]) -> None:
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


def weights_hash(weights: Weights) -> str:
    """Hash of all weights, by name."""
    digest = xxhash.xxh3_128()
    for name, tensor in weights():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def fill_reference(rows: Rows | None, engine: SingleEngine, config: Config, init_hash: str) -> None:
    """Log-probabilities of every answer under the model as it stands (the starting model), computed once and cached.

    All ranks share the work. The cache is keyed by the model's weights, the data, and the precision (in which engines
    differ where it is not float32).
    """
    if rows is None:
        return
    assert isinstance(rows, PairRows)
    precision = "float32" if engine.dtype == torch.float32 else f"{engine.dtype} {engine.name}"
    key = xxhash.xxh3_64_hexdigest(f"{init_hash} {rows.encoded.fingerprint} {precision}".encode())
    path = Path(config.cache_dir) / f"reference-{key}.pt"
    cached = torch.load(path, weights_only=True).numpy() if path.is_file() else None
    if all(engine.gather(cached is not None)) and cached is not None:
        rows.reference = cached
        return
    loader = Loader(rows, config.batch_size, rank=engine.world.rank, world_size=engine.world.size, shuffle=False)
    reference = torch.zeros(rows.reference.shape, dtype=torch.float64)
    for position in range(0, len(rows), loader.rows_per_update):
        batch: Any
        for batch in loader.update(position):
            logps = engine.apply(partial(sequence_logps, batch=batch.to(engine.device)))
            reference[batch.pair_ids] = logps.double().cpu()
    total = engine.sum_over_ranks(reference.flatten().tolist())
    rows.reference = torch.tensor(total).view_as(reference).float().numpy()
    if engine.world.rank == 0:
        part = path.with_name(path.name + ".part")
        torch.save(torch.from_numpy(rows.reference), part)
        os.replace(part, path)


def run_identity(config: Config, weights: Weights, data: Data) -> dict[str, Any]:
    """What a checkpoint must share with a run to continue it exactly."""
    return {
        "stage": config.stage,
        "data": data.train.encoded.fingerprint,
        "seed": config.seed,
        "optimizer": config.optimizer,
        "init_from": "none" if config.init_from == "none" else weights_hash(weights),
        "shape": {name: getattr(config, name) for name in (*SHAPE_FLAGS, "max_seq_len")},
    } | ({"beta": getattr(config, "beta", None)} if config.stage == "dpo" else {})
