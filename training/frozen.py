"""What a frozen model says of the rows that a run comes to: asked once, and cached.

    said = FrozenOutputs("reference", made_of, offsets=[0, 2, 3], blank=..., ask=...)       two rows, of 2 and 1 entries
    said.of(loader, engine, config)        (float32 (3, 2),): of every table all entries, NaN in rows nobody came to yet

An entry is a pair in DPO's reference (reference.py) and a place that learns for a teacher's likeliest tokens
(top_k.py). All ranks share the work, each asking about its share of the rows.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from dataset import Loader
from dataset.loader import EMPTY_ROW, ENDLESS, fitting
from dataset.progress import Progress
from training import checkpoint
from training.config import Config
from training.engines.contract import Engine

LARGER = 4  # times the rows of training are asked about at once: no gradient takes memory
Tables = tuple[Tensor, ...]  # (entries, ...) each; the last is of floats, NaN where nobody asked yet


@dataclass
class FrozenOutputs:
    name: str  # of the cache's files, and of the work in its progress line
    made_of: str  # beside the data, from whatever the outputs follow, the version of the code too
    offsets: np.ndarray  # int64 (rows + 1,): the entries of row i are offsets[i] to offsets[i + 1], at least one
    blank: Tables  # before anybody asked
    ask: Callable[[list[int]], Tables]  # row numbers (EMPTY_ROW for padding) -> what is said of their entries

    def of(self, loader: Loader, engine: Engine, config: Config) -> Tables:
        """The tables, after asking about the rows of this run that nobody asked about before."""
        rows = loader.rows
        assert rows.packing is not None  # they are packed, not made as training goes
        made_of = f"{self.made_of} {rows.encoded.fingerprint} {rows.packing.capacity}"
        path = Path(config.cache_dir) / f"{self.name}-{xxhash.xxh3_64_hexdigest(made_of.encode())}.pt"
        # every rank reads its own copy; where one has none, none is used, so that all have the same work left
        tables = read(path) if all(engine.gather(path.is_file())) else self.blank
        seen = loader.rows_before(max(engine.gather(last_position(loader, config))))
        # a row is asked about as a whole, so that its first entry tells of all
        unknown = tables[-1][self.offsets[seen]].flatten(1).isnan().any(1).numpy()
        wanted = sorted(set().union(*engine.gather(seen[unknown].tolist())))  # caches of nodes may differ
        if wanted:
            tables = tuple(table.clone() for table in tables)  # those of the file stay as they are
            self.fill(tables, wanted, engine, fitting(LARGER * config.batch_size, len(wanted), engine.world.data_size))
            if engine.world.local_rank == 0:
                write(tables, path)
            engine.barrier()
            tables = read(path)  # a page at a time, and once for all ranks of a node
        return tables

    def fill(self, tables: Tables, wanted: list[int], engine: Engine, batch_size: int) -> None:
        """What is said of these rows, into the tables of every rank."""
        world = engine.world
        together = batch_size * world.data_size
        with Progress(self.name, len(wanted), show=world.rank == 0, unit="packed rows") as progress:
            for start in range(0, len(wanted), together):
                now = wanted[start : start + together]
                mine = now[world.data_rank * batch_size :][:batch_size]
                said = self.ask(mine + [EMPTY_ROW] * (batch_size - len(mine)))
                for row_ids, found in engine.gather((mine, tuple(each.cpu() for each in said))):
                    here = entries(self.offsets, row_ids)
                    for table, values in zip(tables, found, strict=True):
                        table[here] = values.to(table.dtype)
                progress.update(len(now))


def entries(offsets: np.ndarray, row_ids: list[int]) -> Tensor:
    """Where the entries of these rows stand in a table, int64 (entries,)."""
    spans = [np.arange(offsets[row], offsets[row + 1]) for row in row_ids if row != EMPTY_ROW]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *spans]))


def last_position(loader: Loader, config: Config) -> int:
    """The position at which a run ends, whichever of its checkpoints it goes on from: another number of ranks may have
    made its updates larger before."""
    if loader.total_rows < ENDLESS:
        return loader.total_rows
    if config.resume not in ("auto", "none"):
        return ENDLESS  # from a checkpoint that may be any run's
    folders = checkpoint.by_step(config.run_dir / "checkpoints")
    saved = [checkpoint.read_run(folder)["progress"] for folder in folders if (folder / "run.json").is_file()]
    starts = [(0, 0), *((progress["step"], progress["position"]) for progress in saved)]
    return max(position + max(0, config.max_steps - step) * loader.rows_per_update for step, position in starts)


def read(path: Path) -> Tables:
    return torch.load(path, weights_only=True, mmap=True)


def write(tables: Tables, path: Path) -> None:
    """Whole or not at all."""
    # a name of its own: another run may be writing the same file
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    torch.save(tables, part)
    os.replace(part, path)
