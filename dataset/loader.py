"""Encoded columns in, this rank's micro-batches out; the order depends on seed and epoch alone.

    rows = TextRows(encoded, max_seq_len=512, pad_id=3)          len(rows) packed rows
    loader = Loader(rows, batch_size=4, accumulation_steps=2, rank=1, world_size=2, seed=0)
    loader.update(position=32)   -> two Batches: of the global rows 32..48, rank 1 gets 36..40 and 44..48

A position is a count of rows since the start of training, over all ranks and epochs. It is the loader's whole state:
resuming on another number of ranks continues at the same row. An update that reaches past the last row is filled with
rows of padding, which weigh nothing, so that every rank always has the same number of micro-batches.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch

from dataset.batch import IGNORE, Batch, PairBatch, blank
from dataset.encode import Encoded, Report, Rules, encode_files
from dataset.pack import Packing, pack
from dataset.records import Stage, expand_paths

EMPTY_ROW = -1


class Column:
    """One list column of a memory-mapped Arrow table as numpy slices, without copying: column[i] -> (length of row i,)."""

    def __init__(self, table: datasets.Dataset, name: str):
        chunks = table.data.column(name).chunks
        self.values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self.offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self.first = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(offsets) for offsets in self.offsets]) if self.offsets else np.zeros(0, np.int64)

    def __getitem__(self, i: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.first, i, side="right")) - 1
        offsets, place = self.offsets[chunk], i - self.first[chunk]
        return self.values[chunk][offsets[place] : offsets[place + 1]]


class Rows(Protocol):
    """Packed rows of one part of the data."""

    encoded: Encoded
    packing: Packing

    def __len__(self) -> int: ...
    def collate(self, row_ids: list[int]) -> Batch: ...


class TextRows:
    """Packed rows of next-token training (pretraining and SFT)."""

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.ids = Column(encoded.columns, "ids")
        self.spans = Column(encoded.columns, "spans") if encoded.stage == "full_sft" else None
        # a document of n tokens has n - 1 pairs of input and label
        self.packing = pack(self.ids.lengths() - 1, max_seq_len, split=encoded.stage == "pretrain")

    def __len__(self) -> int:
        return len(self.packing)

    def collate(self, row_ids: list[int]) -> Batch:
        """Row numbers (EMPTY_ROW for padding) -> Batch of (len(row_ids), max_seq_len)."""
        batch = blank(len(row_ids), self.packing.capacity, self.pad_id)
        real = 0
        for i, row in enumerate(row_ids):
            place = 0
            for piece in pieces_of(self.packing, row):
                document, start, length = (
                    int(x[piece]) for x in (self.packing.document, self.packing.start, self.packing.length)
                )
                here = slice(place, place + length)
                tokens = torch.from_numpy(self.ids[document][start : start + length + 1].astype(np.int64))
                batch["input_ids"][i, here] = tokens[:-1]
                batch["labels"][i, here] = tokens[1:] if self.spans is None else supervise(tokens, self.spans[document])
                batch["position_ids"][i, here] = torch.arange(length)
                place += length
            real += place
        return Batch(
            **batch, row_ids=list(row_ids), real_tokens=real, supervised=int((batch["labels"] != IGNORE).sum())
        )


class PairRows:
    """Packed rows of preference pairs: a row is two sequences wide and holds whole pairs, chosen before rejected."""

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.sides = [Column(encoded.columns, "chosen"), Column(encoded.columns, "rejected")]
        self.prompt = np.asarray(encoded.columns.with_format("numpy")["prompt"])
        lengths = self.sides[0].lengths() + self.sides[1].lengths() - 2
        self.packing = pack(lengths, 2 * max_seq_len, split=False)
        self.reference = np.zeros((len(lengths), 2), dtype=np.float32)  # filled by whoever holds the reference model

    def __len__(self) -> int:
        return len(self.packing)

    def collate(self, row_ids: list[int]) -> PairBatch:
        """Row numbers (EMPTY_ROW for padding) -> PairBatch of (len(row_ids), 2 * max_seq_len)."""
        batch = blank(len(row_ids), self.packing.capacity, self.pad_id)
        segment = torch.full_like(batch["labels"], -1)
        pairs: list[int] = []
        real = 0
        for i, row in enumerate(row_ids):
            place = 0
            for piece in pieces_of(self.packing, row):
                pair = int(self.packing.document[piece])
                for side, column in enumerate(self.sides):
                    tokens = torch.from_numpy(column[pair].astype(np.int64))
                    length, prompt = len(tokens) - 1, int(self.prompt[pair])
                    here, answer = slice(place, place + length), slice(place + prompt - 1, place + length)
                    batch["input_ids"][i, here] = tokens[:-1]
                    batch["position_ids"][i, here] = torch.arange(length)
                    batch["labels"][i, answer] = tokens[prompt:]
                    segment[i, answer] = 2 * len(pairs) + side
                    place += length
                pairs.append(pair)
            real += place
        supervised = int((batch["labels"] != IGNORE).sum())
        reference = torch.from_numpy(self.reference[pairs])
        return PairBatch(
            **batch,
            row_ids=list(row_ids),
            real_tokens=real,
            supervised=supervised,
            segment=segment,
            pair_ids=pairs,
            reference=reference,
        )


def pieces_of(packing: Packing, row: int) -> range:
    return range(0) if row == EMPTY_ROW else range(int(packing.offsets[row]), int(packing.offsets[row + 1]))


def supervise(tokens: torch.Tensor, spans: np.ndarray) -> torch.Tensor:
    """Labels of a whole document: the next token within the spans (start, end, start, end ...), IGNORE elsewhere."""
    labels = torch.full((len(tokens) - 1,), IGNORE)
    for start, end in spans.reshape(-1, 2).tolist():
        labels[max(start - 1, 0) : end - 1] = tokens[max(start, 1) : end]
    return labels


def micro_batches(rows_per_update: int, rows_together: int) -> int:
    """Micro-batches an update takes where all ranks together have `rows_together` rows in each; the last may be padded."""
    return -(-rows_per_update // rows_together)


@dataclass
class Loader:
    """Slices the global row order for one rank.

    `rows_per_update` rows make one update, whatever the number of ranks: with it the accumulation follows, and what of
    the last micro-batches reaches past it is padding.
    """

    rows: Rows
    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    total_rows: int | None = None  # rows in the whole of training, over all epochs; None: one pass
    shuffle: bool = True
    rows_per_update: int = 0  # over all ranks; 0: batch_size * accumulation_steps * world_size

    def __post_init__(self) -> None:
        together = self.batch_size * self.world_size
        if self.rows_per_update:
            self.accumulation_steps = micro_batches(self.rows_per_update, together)
        else:
            self.rows_per_update = together * self.accumulation_steps
        self.order = lru_cache(maxsize=2)(self.order)  # type: ignore[method-assign]
        if self.total_rows is None:
            self.total_rows = len(self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch, (len(rows),)."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def row_at(self, position: int) -> int:
        assert self.total_rows is not None
        if position >= self.total_rows:
            return EMPTY_ROW
        epoch, place = divmod(position, len(self.rows))
        return int(self.order(epoch)[place])

    def update(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the update whose first global row is `position`."""
        batches = []
        for micro in range(self.accumulation_steps):
            first = (micro * self.world_size + self.rank) * self.batch_size
            here = range(first, first + self.batch_size)
            rows = [self.row_at(position + i) if i < self.rows_per_update else EMPTY_ROW for i in here]
            batches.append(self.rows.collate(rows))
        return batches


def build_rows(
    stage: Stage,
    data_path: str | Path | list[str],
    tokenizer: Any,
    max_seq_len: int,
    *,
    part: str = "all",
    val_fraction: float = 0.0,
    on_bad_row: str = "stop",
    cache_dir: str | Path = ".cache",
) -> Rows | None:
    """Files -> packed rows, encoded into the cache first where they are new. None where no row is left in this part.

    part "train" or "val" is one side of a split that keeps `val_fraction` of the documents, by their hash, for "val".
    Raises FileNotFoundError, and DataError for a bad row or one of another stage.
    """
    rules = Rules(stage, max_seq_len, on_bad_row, val_fraction, part)
    encoded = encode_files(expand_paths(data_path), tokenizer, rules, cache_dir)
    if not encoded.report.used:
        return None
    rows = PairRows if stage == "dpo" else TextRows
    return rows(encoded, max_seq_len, tokenizer.pad_id)


def build_pretrain_loader(
    data_path: str | list[str], tokenizer: Any, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed documents of {"text": ...} rows; settings go to build_rows and Loader."""
    return build_loader("pretrain", data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_sft_loader(
    data_path: str | list[str], tokenizer: Any, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed conversations; labels stand on assistant turns only."""
    return build_loader("full_sft", data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_dpo_loader(
    data_path: str | list[str], tokenizer: Any, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed preference pairs, in rows of 2 * max_seq_len."""
    return build_loader("dpo", data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_loader(
    stage: Stage, data_path: str | list[str], tokenizer: Any, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Raises ValueError where the files hold nothing to learn from."""
    for_rows = {
        name: settings.pop(name) for name in ("part", "val_fraction", "on_bad_row", "cache_dir") if name in settings
    }
    rows = build_rows(stage, data_path, tokenizer, max_seq_len, **for_rows)
    if rows is None:
        raise ValueError(f"{data_path}: no row is left to learn from")
    return Loader(rows, batch_size, **settings)


def describe(parts: dict[str, Rows | None]) -> tuple[list[str], list[list[str]], list[str]]:
    """The start table: header, one line a part, and notes on what was dropped, cut or bad."""
    header = ["part", "rows read", "used", "dropped", "bad", "tokens", "supervised", "packed rows", "real tokens"]
    lines, notes = [], []
    for name, rows in parts.items():
        if rows is None:
            lines.append([name, *["0"] * 7, "-"])
            continue
        report: Report = rows.encoded.report
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
        notes += (
            [f"{name}: {left_out:,} tokens left out by the cuts; a larger --max_seq_len keeps them"] if left_out else []
        )
        notes += [f"{name}: bad row skipped: {message}" for message in report.bad[:10]]
        notes += [f"{name}: ... and {len(report.bad) - 10} more bad rows"] if len(report.bad) > 10 else []
    return header, lines, notes
