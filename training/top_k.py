"""What a teacher finds likeliest at every place that learns, asked once and cached.

    fill_top_k(loader, teacher, engine, config)        loader.rows = TaughtRows: its batches are TaughtBatches

Two more columns of the batch, so that training holds no second model. Rows that the run does not come to are left out
(they are not a number) until another run does.
"""

from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from dataset import Loader
from dataset.loader import EMPTY_ROW, Rows, TextRows, fitting, supervised
from dataset.progress import Progress
from model.gpt import chunks
from training.distillation import TopK, softened
from training.engines.contract import Engine
from training.reference import LARGER, rows_to_ask, write
from training.stages import DistillConfig
from training.teacher import Said, TaughtBatch, Teacher

VERSION = 1  # raise it when the same teacher and rows give other numbers, so that old caches are left alone


class TaughtRows:
    """Packed rows with what a teacher finds likeliest.

    first: int64 (rows + 1,), where each row's places begin in `known`, which has those of all rows one after another.
    """

    beside: Rows | None = None

    def __init__(self, rows: TextRows, first: np.ndarray, known: TopK):
        self.rows, self.first, self.known = rows, first, known
        self.encoded, self.packing, self.fingerprint = rows.encoded, rows.packing, rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self, limit: int) -> list[list[int]]:
        return self.rows.prompts(limit)

    def collate(self, row_ids: list[int]) -> TaughtBatch:
        """Raises ValueError for rows that the teacher was not asked about."""
        here = places_of(self.first, row_ids)
        ids, logps = self.known.ids[here].long(), self.known.logps[here]
        if logps.isnan().any():
            raise ValueError("the teacher was not asked about these rows yet; fill_top_k does")
        return TaughtBatch(**vars(self.rows.collate(row_ids)), teacher_ids=ids, teacher_logps=logps)


def places_of(first: np.ndarray, row_ids: list[int]) -> Tensor:
    """Where the places of these rows stand in the table, int64 (supervised,)."""
    spans = [np.arange(first[row], first[row + 1]) for row in row_ids if row != EMPTY_ROW]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *spans]))


def first_places(rows: TextRows) -> np.ndarray:
    """Of every row the first of its places that learn, all rows' counted on: int64 (rows + 1,)."""
    lengths = rows.ids.lengths() - 1
    assert rows.spans is not None  # of conversations, which are never split
    learnt = supervised([rows.spans[i] for i in range(len(lengths))], lengths)
    of_document = np.add.reduceat(learnt, np.append(0, lengths.cumsum()[:-1]), dtype=np.int64)
    of_row = np.add.reduceat(of_document[rows.packing.document], rows.packing.offsets[:-1])
    return np.append(0, of_row.cumsum())


def fill_top_k(loader: Loader, teacher: Teacher, engine: Engine, config: DistillConfig) -> None:
    """Ask the teacher about the rows that a run will see, each rank about its share.

    The cache is keyed by the teacher (weights and config), the data, k, the temperature, the precision and the version
    of this code. Raises ValueError where the vocabulary has fewer tokens than are asked for.
    """
    rows, k, size = loader.rows, config.teacher_top_k, teacher.config.vocab_size
    assert isinstance(rows, TextRows)
    if k > size:
        raise ValueError(f"--teacher_top_k is {k}, the teacher has {size:,} tokens; give at most that, or 0 for all")
    made_of = f"{VERSION} {teacher.identity} {rows.fingerprint} {rows.packing.capacity} {k} "
    made_of += f"{config.distill_temperature} {engine.dtype}"
    path = Path(config.cache_dir) / f"teacher-{xxhash.xxh3_64_hexdigest(made_of.encode())}.pt"
    first = first_places(rows)
    n = int(first[-1])
    known = TopK(torch.zeros(n, k, dtype=torch.int32), torch.full((n, k + 1), torch.nan))
    # every rank reads its own copy; where one has none, none is used, so that all have the same work left
    if all(engine.gather(path.is_file())):
        known = read(path)
    unknown = known.logps[first[:-1], 0].isnan().numpy()  # of every row's first place; no row is without one
    wanted = rows_to_ask(loader, engine, config, np.flatnonzero(unknown))
    if wanted:
        known = TopK(*(each.clone() for each in known))  # the file's stay as they are
        ask_ahead(rows, first, wanted, known, teacher, engine, config)
        if engine.world.local_rank == 0:
            write(tuple(known), path)
        engine.barrier()
        known = read(path)  # a page at a time, and once for all ranks of a node
    teacher.let_go()
    loader.rows = TaughtRows(rows, first, known)


def read(path: Path) -> TopK:
    return TopK(*torch.load(path, weights_only=True, mmap=True))


def ask_ahead(
    rows: TextRows, first: np.ndarray, wanted: list[int], known: TopK, teacher: Teacher, engine: Engine,
    config: DistillConfig,
) -> None:  # fmt: skip
    """Fill in what the teacher says of these rows, on every rank, each having asked about its share."""
    world, like = engine.world, torch.zeros((), device=engine.device, dtype=engine.dtype)
    batch_size = fitting(LARGER * config.batch_size, len(wanted), world.data_size)
    together = batch_size * world.data_size
    with Progress("teacher", len(wanted), show=world.rank == 0, unit="packed rows") as progress:
        for start in range(0, len(wanted), together):
            now = wanted[start : start + together]
            mine = now[world.data_rank * batch_size :][:batch_size]
            batch = rows.collate(mine + [EMPTY_ROW] * (batch_size - len(mine))).to(engine.device)
            found = likeliest(teacher.ask(batch, like), config.teacher_top_k, config.distill_temperature)
            for row_ids, said in engine.gather((mine, [each.cpu() for each in found])):
                here = places_of(first, row_ids)
                known.ids[here], known.logps[here] = said[0].int(), said[1]
            progress.update(len(now))


@torch.no_grad()
def likeliest(said: Said, k: int, temperature: float) -> TopK:
    """The k likeliest tokens of every place, and the mass of all others, a chunk of logits at a time."""
    found = []
    for part in chunks(said.hidden, said.weight) or [slice(0)]:
        log_p = softened(said.part(part), temperature)
        logps, ids = log_p.topk(k)
        left = log_p.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        found.append(TopK(ids, torch.cat([logps, left], 1)))
    return TopK(*(torch.cat(each) for each in zip(*found, strict=True)))
