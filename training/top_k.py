"""What a teacher finds likeliest at every place that learns, asked once and cached.

    fill_top_k(loader, teacher, engine, config)        loader.rows = TaughtRows: its batches are TaughtBatches

Two more columns of the batch, so that training holds no second model. Rows that the run does not come to are left out
(they are not a number) until another run does.
"""

import numpy as np
import torch

from dataset import Loader
from dataset.loader import TextRows, supervised
from model.gpt import chunks
from training.distillation import TopK, softened
from training.engines.contract import Engine
from training.frozen import FrozenOutputs, entries
from training.stages import DistillConfig
from training.teacher import Said, TaughtBatch, Teacher

VERSION = 2  # raise it when the same teacher and rows give other numbers, so that old caches are left alone


class TaughtRows(TextRows):
    """Packed rows with what a teacher finds likeliest.

    first: int64 (rows + 1,), where each row's places begin in `known`, which has those of all rows one after another.
    """

    def __init__(self, rows: TextRows, first: np.ndarray, known: TopK):
        vars(self).update(vars(rows))
        self.first, self.known = first, known

    def collate(self, row_ids: list[int]) -> TaughtBatch:
        """Raises ValueError for rows that the teacher was not asked about."""
        here = entries(self.first, row_ids)
        ids, logps = self.known.ids[here].long(), self.known.logps[here]
        if logps.isnan().any():
            raise ValueError("the teacher was not asked about these rows yet; fill_top_k does")
        return TaughtBatch(**vars(super().collate(row_ids)), teacher_ids=ids, teacher_logps=logps)


def first_places(rows: TextRows) -> np.ndarray:
    """Of every row the first of its places that learn, all rows' counted on: int64 (rows + 1,)."""
    assert rows.spans is not None  # of conversations, which are never split: a piece is a document
    packing = rows.packing
    learnt = supervised([rows.spans[i] for i in packing.document.tolist()], packing.length)
    first_labels = np.append(0, packing.length.cumsum())[packing.offsets]
    return np.append(0, learnt.cumsum())[first_labels]


def fill_top_k(loader: Loader, teacher: Teacher, engine: Engine, config: DistillConfig) -> None:
    """Ask the teacher about the rows that a run will see.

    The cache is keyed by the teacher (weights and config), the data, k, the temperature, the precision and the version
    of this code. Raises ValueError where the vocabulary has fewer tokens than are asked for.
    """
    rows, k, temperature = loader.rows, config.teacher_top_k, config.distill_temperature
    assert isinstance(rows, TextRows)
    if k > (size := teacher.config.vocab_size):
        raise ValueError(f"--teacher_top_k is {k}, the teacher has {size:,} tokens; give at most that, or 0 for all")
    first, like = first_places(rows), torch.zeros((), device=engine.device, dtype=engine.dtype)

    def ask(row_ids: list[int]) -> TopK:
        batch = rows.collate(row_ids).to(engine.device)
        return likeliest(teacher.ask(batch, like), k, temperature)

    made_of = f"{VERSION} {teacher.identity} {k} {temperature} {engine.dtype}"
    blank = TopK(torch.zeros(first[-1], k, dtype=torch.int32), torch.full((first[-1], k + 1), torch.nan))
    known = FrozenOutputs("teacher", made_of, first, blank, ask).of(loader, engine, config)
    teacher.let_go()
    loader.rows = TaughtRows(rows, first, TopK(*known))


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
