"""Token columns in, packed rows, this rank's micro-batches out; the order depends on seed and epoch alone.

    rows = TextRows(encoded, max_seq_len=512, pad_id=3)          len(rows) packed rows
    rows.collate([7, 2, EMPTY_ROW])                              Batch of (3, 512): row 7, row 2, and one of padding
    loader = Loader(rows, batch_size=4, accumulation_steps=2, rank=1, world_size=2, seed=0)
    loader.update(position=32)   -> two Batches: of the global rows 32..48, rank 1 gets 36..40 and 44..48

A position is a count of rows since the start of training, over all ranks and epochs. It is the loader's whole state:
resuming on another number of ranks continues at the same row. An update that reaches past the last row is filled with
rows of padding, which weigh nothing, so that every rank always has the same number of micro-batches. Columns lie in
memory-mapped Arrow files; nothing is read before a batch asks for it.
"""

import sys
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dataset.batch import IGNORE, Batch, PairBatch
from dataset.columns import Encoded
from dataset.pack import Packing, pack

EMPTY_ROW = -1
ENDLESS = sys.maxsize  # total_rows of a run that counts its steps instead


class Column:
    """One list column of a memory-mapped Arrow table as numpy slices, not copied: column[i] -> (length of row i,)."""

    def __init__(self, table: pa.Table, name: str):
        chunks = table.column(name).chunks
        # not by Arrow's to_numpy, which imports pandas: half a second
        self.values = [np.from_dlpack(chunk.values) for chunk in chunks]
        self.offsets = [np.from_dlpack(chunk.offsets) for chunk in chunks]
        self.first = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(offsets) for offsets in self.offsets]) if self.offsets else np.zeros(0, np.int64)

    def __getitem__(self, i: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.first, i, side="right")) - 1
        offsets, place = self.offsets[chunk], i - self.first[chunk]
        return self.values[chunk][offsets[place] : offsets[place + 1]]

    def tokens(self, i: int) -> torch.Tensor:
        """int64 (length of row i,)."""
        return torch.from_numpy(self[i].astype(np.int64))


class Rows(Protocol):
    """Packed rows of one part of the data."""

    encoded: Encoded
    packing: Packing

    def __len__(self) -> int: ...
    def collate(self, row_ids: list[int]) -> Batch: ...
    def prompts(self, limit: int) -> list[list[int]]:
        """The first different prompts, rendered, that have more than one right answer; [] where rows have none."""


class TextRows:
    """Packed rows of next-token training. Columns without spans are plain text: all of it is learnt, and a document may
    be split between rows; with spans (of a conversation) neither holds."""

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.ids = Column(encoded.columns, "ids")
        self.spans = Column(encoded.columns, "spans") if "spans" in encoded.columns.column_names else None
        # a document of n tokens has n - 1 pairs of input and label
        self.packing = pack(self.ids.lengths() - 1, max_seq_len, split=self.spans is None)

    def __len__(self) -> int:
        return len(self.packing)

    def collate(self, row_ids: list[int]) -> Batch:
        """Row numbers (EMPTY_ROW for padding) -> Batch of (len(row_ids), max_seq_len)."""
        batch = blank(len(row_ids), self.packing.capacity, self.pad_id)
        real = 0
        for i, row in enumerate(row_ids):
            place = 0
            for document, start, length in pieces_of(self.packing, row):
                here = slice(place, place + length)
                tokens = self.ids.tokens(document)[start : start + length + 1]
                batch["input_ids"][i, here] = tokens[:-1]
                batch["labels"][i, here] = tokens[1:] if self.spans is None else supervise(tokens, self.spans[document])
                batch["position_ids"][i, here] = torch.arange(length)
                place += length
            real += place
        supervised = int((batch["labels"] != IGNORE).sum())
        return Batch(**batch, row_ids=list(row_ids), real_tokens=real, supervised=supervised)

    def prompts(self, limit: int) -> list[list[int]]:
        return []


class PairRows:
    """Packed rows of preference pairs: a row is two sequences wide and holds whole pairs, chosen before rejected.

    reference: float32 (pairs, 2), log-probabilities of the answers under the frozen starting model, nats. It is filled
    by whoever holds that model (training/reference.py); until then there are no batches.
    """

    reference: np.ndarray | None = None

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.sides = [Column(encoded.columns, "chosen"), Column(encoded.columns, "rejected")]
        self.prompt = np.concatenate([np.from_dlpack(chunk) for chunk in encoded.columns.column("prompt").chunks])
        lengths = self.sides[0].lengths() + self.sides[1].lengths() - 2
        self.packing = pack(lengths, 2 * max_seq_len, split=False)

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def n_pairs(self) -> int:
        return len(self.prompt)

    def prompts(self, limit: int) -> list[list[int]]:
        all_of_them = (tuple(self.sides[0][i][: int(n)].tolist()) for i, n in enumerate(self.prompt))
        return [list(ids) for ids in islice(dict.fromkeys(all_of_them), limit)]

    def collate(self, row_ids: list[int]) -> PairBatch:
        """Row numbers (EMPTY_ROW for padding) -> PairBatch of (len(row_ids), 2 * max_seq_len).

        Raises ValueError while there is no reference.
        """
        if self.reference is None:
            raise ValueError("these pairs have no reference log-probabilities yet; fill_reference computes them")
        batch = blank(len(row_ids), self.packing.capacity, self.pad_id)
        segment = torch.full_like(batch["labels"], -1)
        pairs: list[int] = []
        real = 0
        for i, row in enumerate(row_ids):
            place = 0
            for pair, _, _ in pieces_of(self.packing, row):
                for side, column in enumerate(self.sides):
                    tokens = column.tokens(pair)
                    length, prompt = len(tokens) - 1, int(self.prompt[pair])
                    here, answer = slice(place, place + length), slice(place + prompt - 1, place + length)
                    batch["input_ids"][i, here] = tokens[:-1]
                    batch["position_ids"][i, here] = torch.arange(length)
                    batch["labels"][i, answer] = tokens[prompt:]
                    segment[i, answer] = 2 * len(pairs) + side
                    place += length
                pairs.append(pair)
            real += place
        return PairBatch(
            **batch,
            row_ids=list(row_ids),
            real_tokens=real,
            supervised=int((batch["labels"] != IGNORE).sum()),
            segment=segment,
            pair_ids=pairs,
            reference=torch.from_numpy(self.reference[pairs]),
        )


def blank(rows: int, sequence: int, pad_id: int) -> dict[str, Tensor]:
    """Tensors of nothing but padding."""
    shape = (rows, sequence)
    return {
        "input_ids": torch.full(shape, pad_id, dtype=torch.long),
        "labels": torch.full(shape, IGNORE, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }


def pieces_of(packing: Packing, row: int) -> list[tuple[int, int, int]]:
    """(document, start, length) of every piece in a row."""
    if row == EMPTY_ROW:
        return []
    here = slice(int(packing.offsets[row]), int(packing.offsets[row + 1]))
    columns = (column[here].tolist() for column in (packing.document, packing.start, packing.length))
    return list(zip(*columns, strict=True))


def supervise(tokens: torch.Tensor, spans: np.ndarray) -> torch.Tensor:
    """Labels of a whole document: the next token within the spans (start, end, start, end ...), IGNORE elsewhere."""
    labels = torch.full((len(tokens) - 1,), IGNORE)
    for start, end in spans.reshape(-1, 2).tolist():
        labels[max(start - 1, 0) : end - 1] = tokens[max(start, 1) : end]
    return labels


def micro_batches(rows_per_update: int, rows_together: int) -> int:
    """Micro-batches an update takes where all ranks together have `rows_together` rows in each; the last may be
    padded."""
    return -(-rows_per_update // rows_together)


def fitting(batch_size: int, rows: int, ranks: int) -> int:
    """Rows of a micro-batch, no more than a rank can get where all ranks together have so many; the rest would be
    padding."""
    return min(batch_size, -(-rows // ranks))


@dataclass
class Loader:
    """Slices the global row order for one rank of those that divide the data between them.

    `rows_per_update` rows make one update, whatever the number of ranks: with it the accumulation follows, and what of
    the last micro-batches reaches past it is padding.
    """

    rows: Rows
    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    total_rows: int = 0  # rows in the whole of training, over all epochs; 0: one pass
    shuffle: bool = True
    rows_per_update: int = 0  # over all ranks; 0: batch_size * accumulation_steps * world_size

    ahead = True  # the next update may be asked for while this one is learnt

    def __post_init__(self) -> None:
        together = self.batch_size * self.world_size
        if self.rows_per_update:
            self.accumulation_steps = micro_batches(self.rows_per_update, together)
        else:
            self.rows_per_update = together * self.accumulation_steps
        self.total_rows = self.total_rows or len(self.rows)
        self.row_order = cache(self.order)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def tokens_per_row(self) -> float:
        """Real (non-padding) tokens of a row, on average."""
        return self.rows.packing.capacity * self.rows.packing.efficiency

    def prompts(self, limit: int) -> list[list[int]]:
        return self.rows.prompts(limit)

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch, (len(rows),)."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def row_at(self, position: int) -> int:
        if position >= self.total_rows:
            return EMPTY_ROW
        epoch, place = divmod(position, len(self.rows))
        return int(self.row_order(epoch)[place])

    def update(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the update whose first global row is `position`."""
        batches = []
        for micro in range(self.accumulation_steps):
            first = (micro * self.world_size + self.rank) * self.batch_size
            here = range(first, first + self.batch_size)
            rows = [self.row_at(position + i) if i < self.rows_per_update else EMPTY_ROW for i in here]
            batches.append(self.rows.collate(rows))
        return batches


def describe(parts: dict[str, Rows | None]) -> tuple[list[str], list[list[str]], list[str]]:
    """The start table: header, one line a part, and notes on what was dropped, cut or bad."""
    header = ["part", "rows read", "used", "dropped", "bad", "tokens", "supervised", "packed rows", "real tokens"]
    lines, notes = [], []
    for name, rows in parts.items():
        if rows is None:
            lines.append([name, *["0"] * 7, "-"])
            continue
        report = rows.encoded.report
        counts = [
            report.read,
            report.used,
            sum(report.dropped.values()),
            len(report.bad),
            report.tokens,
            report.supervised,
            len(rows),
        ]
        lines.append([name, *(f"{count:,}" for count in counts), f"{rows.packing.efficiency:.1%}"])
        notes += [f"{name}: {count:,} rows dropped: {reason}" for reason, count in report.dropped.items()]
        left_out = report.cut.get("tokens left out", 0)
        notes += [
            f"{name}: {count:,} rows cut {where}" for where, count in report.cut.items() if where != "tokens left out"
        ]
        if left_out:
            notes.append(f"{name}: {left_out:,} tokens left out by the cuts; a larger --max_seq_len keeps them")
        notes += [f"{name}: bad row skipped: {message}" for message in report.bad[:10]]
        notes += [f"{name}: ... and {len(report.bad) - 10} more bad rows"] if len(report.bad) > 10 else []
    return header, lines, notes
