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

import copy
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dataset.batch import IGNORE, Batch, PairBatch
from dataset.columns import Encoded
from dataset.forms import Value
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


class Sequences(Protocol):
    """Token ids of every row, by its number."""

    def lengths(self) -> np.ndarray: ...
    def __getitem__(self, i: int) -> np.ndarray: ...


class Rows(Protocol):
    """Packed rows of one part of the data."""

    encoded: Encoded
    fingerprint: str  # of the data and of how it stands in rows

    @property
    def packing(self) -> Packing | None:
        """None where nothing is packed."""

    @property
    def beside(self) -> "Rows | None":
        """Other rows by the same numbers, that are asked about before these are learnt; None where nothing is."""

    def __len__(self) -> int: ...
    def collate(self, row_ids: list[int]) -> Batch: ...
    def prompts(self, limit: int) -> list[list[int]]:
        """The first different prompts, rendered, that have more than one right answer; [] where rows have none."""


class TextRows:
    """Packed rows of next-token training. Columns without spans are plain text: all of it is learnt, and a document may
    be split between rows; with spans (of a conversation) neither holds."""

    beside: Rows | None = None

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.fingerprint = encoded.fingerprint
        self.ids = Column(encoded.columns, "ids")
        self.spans = Column(encoded.columns, "spans") if "spans" in encoded.columns.column_names else None
        # a document of n tokens has n - 1 pairs of input and label
        self.packing = pack(self.ids.lengths() - 1, max_seq_len, split=self.spans is None)
        self.most_pieces = int(np.diff(self.packing.offsets).max(initial=0))  # in one row

    def __len__(self) -> int:
        return len(self.packing)

    def collate(self, row_ids: list[int]) -> Batch:
        """Row numbers (EMPTY_ROW for padding) -> Batch of (len(row_ids), max_seq_len)."""
        shape = (len(row_ids), self.packing.capacity)
        row, document, start, length = pieces_of(self.packing, row_ids)
        pieces = zip(document.tolist(), start.tolist(), length.tolist(), strict=True)
        runs = [self.ids[d][s : s + n + 1] for d, s, n in pieces]  # and one token more: the last label
        laid = lay_out(runs, np.zeros(len(runs), dtype=np.int64), row, shape)
        learnt = np.ones(len(laid.places), dtype=bool)
        if self.spans is not None:
            learnt = supervised([self.spans[d] for d in document.tolist()], length)
        ends = np.union1d(laid.ends, row_ends(shape))  # what is left of a row is a sequence of padding
        return Batch(
            **tensors(laid, learnt, shape, self.pad_id),
            cu_seqlens=cumulative(ends, shape[0] * (self.most_pieces + 1)),
            longest=shape[1],
            row_ids=list(row_ids),
            real_tokens=len(laid.places),
        )

    def prompts(self, limit: int) -> list[list[int]]:
        return []


class PairRows:
    """Packed rows of preference pairs: a row is two sequences wide and holds whole pairs, of which each is prompt and
    chosen answer, then the rejected answer from the prompt's last token on: the prompt is there once.

    reference: float32 (pairs, 2), log-probabilities of the answers under the frozen starting model, nats; (pairs, 0)
        for a loss without one. It is filled by whoever holds that model (training/reference.py); until then there are
        no batches.
    """

    reference: np.ndarray | None = None
    beside: "PairRows | None" = None

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.pad_id = encoded, pad_id
        self.fingerprint = f"{encoded.fingerprint}, prompts once"
        self.sides: list[Sequences] = [Column(encoded.columns, "chosen"), Column(encoded.columns, "rejected")]
        chunks = [np.from_dlpack(chunk) for chunk in encoded.columns.column("prompt").chunks]
        self.prompt = np.concatenate(chunks).astype(np.int64)
        self.shared = np.maximum(self.prompt, 1) - 1  # places of a pair that both answers look back on
        self.lay(self.places(), 2 * max_seq_len)

    def places(self) -> np.ndarray:
        """How many a pair takes, int64 (pairs,)."""
        return self.sides[0].lengths() + self.sides[1].lengths() - 2 - self.shared

    def lay(self, places: np.ndarray, capacity: int) -> None:
        """Decide on the rows."""
        self.packing = pack(places, capacity, split=False)
        self.most_pieces = int(np.diff(self.packing.offsets).max(initial=0))  # in one row
        shared = np.add.reduceat(self.shared[self.packing.document], self.packing.offsets[:-1])
        self.most_shared = int(shared.max(initial=0))

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def n_pairs(self) -> int:
        return len(self.prompt)

    def prompts(self, limit: int) -> list[list[int]]:
        return different((self.sides[0][i][: int(n)].tolist() for i, n in enumerate(self.prompt)), limit)

    def pairs_of(self, row_ids: list[int]) -> list[int]:
        """Numbers of the pairs in these rows, in the order of a batch."""
        return pieces_of(self.packing, row_ids)[1].tolist()

    def learnt(self, laid: "Laid", shared: np.ndarray) -> np.ndarray:
        """Which labels are, bool (tokens,): those that an answer's tokens are. shared: (tokens,), of each token's
        pair."""
        return laid.positions >= shared

    def collate(self, row_ids: list[int]) -> PairBatch:
        """Row numbers (EMPTY_ROW for padding) -> PairBatch of (len(row_ids), 2 * max_seq_len).

        Raises ValueError for pairs without a reference.
        """
        shape = (len(row_ids), self.packing.capacity)
        row, pair, _, _ = pieces_of(self.packing, row_ids)
        if self.reference is None or np.isnan(self.reference[pair]).any():
            raise ValueError("these pairs have no reference log-probabilities yet; fill_reference computes them")
        pairs, shared = pair.tolist(), self.shared[pair]
        sides = [(self.sides[0][i], self.sides[1][i][n:]) for i, n in zip(pairs, shared.tolist(), strict=True)]
        runs = [run for side in sides for run in side]
        firsts = np.stack((np.zeros_like(shared), shared), 1).flatten()
        laid = lay_out(runs, firsts, np.repeat(row, 2), shape)
        run = np.repeat(np.arange(len(runs)), laid.lengths)  # 2 * pair, and 1 more on the rejected side
        learnt = self.learnt(laid, np.repeat(shared, 2)[run])
        segment = np.full(shape, -1)
        segment.flat[laid.places[learnt]] = run[learnt]
        places, lengths, tokens = branches(laid, firsts, np.repeat(np.arange(len(pairs)) * 2, 2), shape)
        return PairBatch(
            **tensors(laid, learnt, shape, self.pad_id),
            cu_seqlens=cumulative(lengths.cumsum(), shape[0] * (2 * self.most_pieces + 1)),
            longest=shape[1],
            places=torch.from_numpy(fixed(places, shape[0] * (shape[1] + self.most_shared), 0)),
            tokens=torch.from_numpy(tokens),
            row_ids=list(row_ids),
            real_tokens=len(laid.places),
            segment=torch.from_numpy(segment),
            pair_ids=pairs,
            n_answers=len(np.unique(run[learnt])),
            reference=torch.from_numpy(self.reference[pairs]),
        )


class LabelledRows(PairRows):
    """Packed rows of labelled answers: pairs that lack the chosen or the rejected answer, whose side is then the bare
    prompt, or whole ones.

    beside: rows of the same numbers and shape with mismatched answers: those of the pair half the data away, whichever
    way an update is put together, so that what the starting model says of them can be known ahead. They are cut like
    any answer.
    """

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        super().__init__(encoded, max_seq_len, pad_id)
        beside = copy.copy(self)
        beside.sides = [Mismatched(side, self.prompt, max_seq_len + 1) for side in self.sides]
        beside.encoded = replace(encoded, fingerprint=f"{encoded.fingerprint}, mismatched")
        capacity = self.packing.capacity
        for rows in (self, beside):
            rows.lay(np.maximum(self.places(), beside.places()), capacity)
        self.beside = beside


class Mismatched:
    """One side of pairs, each prompt with another pair's answer: mismatched[i] -> (length of row i,)."""

    def __init__(self, side: "Sequences", prompt: np.ndarray, limit: int):
        """prompt: (pairs,) tokens of every prompt; limit: tokens of a sequence, at most."""
        self.side, self.prompt, self.limit = side, prompt, limit
        self.other = np.roll(np.arange(len(prompt)), -(len(prompt) // 2))

    def lengths(self) -> np.ndarray:
        answers = self.side.lengths() - self.prompt
        return np.minimum(self.prompt + answers[self.other], self.limit)

    def __getitem__(self, i: int) -> np.ndarray:
        other = int(self.other[i])
        prompt, answer = self.side[i][: self.prompt[i]], self.side[other][self.prompt[other] :]
        return np.concatenate((prompt, answer))[: self.limit]


class ScoredRows(PairRows):
    """Packed rows of pairs of which each answer gets one number, at its last token. That token is read like the others,
    so a token that nobody looks at stands behind it as its label; `segment` and `learnt` are its places alone."""

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        super().__init__(encoded, max_seq_len, pad_id)
        self.fingerprint = f"{self.fingerprint}, last tokens"
        self.sides = [WithLabel(side, pad_id) for side in self.sides]
        self.lay(self.places(), 2 * max_seq_len)
        self.reference = np.zeros((self.n_pairs, 0), dtype=np.float32)

    def learnt(self, laid: "Laid", shared: np.ndarray) -> np.ndarray:
        last = np.zeros(len(laid.inputs), dtype=bool)
        last[laid.lengths.cumsum() - 1] = True
        return last


class WithLabel:
    """Sequences with one token more at the end of each: with_label[i] -> (length of row i + 1,)."""

    def __init__(self, sequences: Sequences, token: int):
        self.sequences, self.token = sequences, token

    def lengths(self) -> np.ndarray:
        return self.sequences.lengths() + 1

    def __getitem__(self, i: int) -> np.ndarray:
        ids = self.sequences[i]
        return np.append(ids, ids.dtype.type(self.token))


class PromptRows:
    """Prompts, each a row; what is learnt are answers to them (training/rollout.py)."""

    packing: Packing | None = None
    beside: Rows | None = None

    def __init__(self, encoded: Encoded, max_seq_len: int, pad_id: int):
        self.encoded, self.fingerprint, self.pad_id = encoded, encoded.fingerprint, pad_id
        self.tokens = Column(encoded.columns, "ids")

    def __len__(self) -> int:
        return len(self.encoded.columns)

    def ids(self, i: int) -> list[int]:
        """Rendered, up to where an answer begins."""
        return self.tokens[i].tolist()

    def row(self, i: int) -> Value:
        """As its form writes it."""
        row: Value = json.loads(self.encoded.columns["row"][i].as_py())
        return row

    def where(self, i: int) -> str:
        """path:line."""
        file, line = (self.encoded.columns[name][i].as_py() for name in ("file", "line"))
        return f"{self.encoded.paths[file]}:{line}"

    def prompts(self, limit: int) -> list[list[int]]:
        return different((self.ids(i) for i in range(len(self))), limit)

    def collate(self, row_ids: list[int]) -> Batch:
        raise AssertionError("a prompt alone teaches nothing; a rollout answers it")


def different(prompts: Iterable[list[int]], limit: int) -> list[list[int]]:
    """The first `limit` that differ."""
    return [list(ids) for ids in islice(dict.fromkeys(map(tuple, prompts)), limit)]


class Laid(NamedTuple):
    """Runs of tokens laid into rows, one after another; arrays are int64, (tokens,) where nothing else is said."""

    inputs: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    places: np.ndarray  # where each stands in the rows end to end
    lengths: np.ndarray  # (runs,)

    @property
    def ends(self) -> np.ndarray:
        """The place after each run, (runs,)."""
        return self.places[self.lengths.cumsum() - 1] + 1


def lay_out(runs: list[np.ndarray], firsts: np.ndarray, row: np.ndarray, shape: tuple[int, int]) -> Laid:
    """Runs of n + 1 tokens, each n inputs and the labels after them, in order into the rows they are for.

    firsts: position of each run's first token; row: the row of each, ascending.
    """
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *runs])
    lengths = np.array([len(run) - 1 for run in runs], dtype=np.int64)
    ends = lengths.cumsum()
    labels = np.delete(tokens, ends - lengths + np.arange(len(runs)))
    inputs = np.delete(tokens, ends + np.arange(len(runs)))
    count = np.arange(len(inputs))
    in_row = np.bincount(row, lengths, shape[0]).astype(np.int64)
    skipped = np.arange(shape[0]) * shape[1] - (in_row.cumsum() - in_row)  # places left empty in the rows before
    positions = count + np.repeat(firsts - (ends - lengths), lengths)
    return Laid(inputs, labels, positions, count + np.repeat(skipped[row], lengths), lengths)


def tensors(laid: Laid, learnt: np.ndarray, shape: tuple[int, int], pad_id: int) -> dict[str, Any]:
    """What all batches hold: padding, and the laid tokens over it. learnt: bool (tokens,), which labels are."""

    def rows(padding: int, at: np.ndarray, values: np.ndarray) -> Tensor:
        filled = np.full(shape, padding, dtype=np.int64)
        filled.flat[at] = values
        return torch.from_numpy(filled)

    places = laid.places[learnt]
    return {
        "input_ids": rows(pad_id, laid.places, laid.inputs),
        "labels": rows(IGNORE, places, laid.labels[learnt]),
        "position_ids": rows(0, laid.places, laid.positions),
        "learnt": torch.from_numpy(places),
        "supervised": len(places),
    }


def branches(
    laid: Laid, firsts: np.ndarray, leaders: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places of all sequences, end to end; the sequences' lengths; and which of these tokens belongs to a place,
    int64 (rows * sequence,): of several the first.

    A sequence is a run with as much of the beginning of another, its leader, as stands before it; of every row what is
    left is one too. firsts: as in `lay_out`, 0 for a leader; leaders: (runs,) the number of each one's.
    """
    runs = np.split(laid.places, laid.lengths.cumsum()[:-1]) if len(laid.lengths) else []
    sequences = []
    for run, leader, first in zip(runs, leaders.tolist(), firsts.tolist(), strict=True):
        sequences += [runs[leader][:first], run]
    padding = np.delete(np.arange(shape[0] * shape[1]), laid.places)
    left = np.bincount(padding // shape[1], minlength=shape[0])
    places = np.concatenate([*sequences, padding])
    tokens = np.empty(shape[0] * shape[1], dtype=np.int64)
    tokens[places[::-1]] = np.arange(len(places))[::-1]
    return places, np.concatenate([laid.lengths + firsts, left]), tokens


def row_ends(shape: tuple[int, int]) -> np.ndarray:
    return np.arange(1, shape[0] + 1) * shape[1]


def cumulative(ends: np.ndarray, most: int) -> Tensor:
    """Cumulative lengths of at most so many sequences: int32 (most + 1,), whatever their number."""
    return torch.from_numpy(fixed(np.concatenate(([0], ends)), most + 1, ends[-1]).astype(np.int32))


def fixed(values: np.ndarray, size: int, filling: int) -> np.ndarray:
    """Filled up to a size that does not depend on the batch: compiled code and CUDA graphs want one shape."""
    return np.concatenate((values, np.full(size - len(values), filling, dtype=values.dtype)))


def pieces_of(packing: Packing, row_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Index among `row_ids`, document, start and length of every piece in these rows, in order."""
    ids = np.array(row_ids, dtype=np.int64)
    first, last = packing.offsets[ids], np.where(ids == EMPTY_ROW, packing.offsets[ids], packing.offsets[ids + 1])
    row = np.repeat(np.arange(len(ids)), last - first)
    here = np.concatenate([np.arange(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    return row, packing.document[here], packing.start[here], packing.length[here]


def supervised(spans: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Which labels of whole documents stand within their spans (start, end, start, end ...; of tokens): bool (labels,).

    lengths: labels of each document; label i is its token i + 1.
    """
    edges = np.concatenate([np.zeros(0, dtype=np.int64), *spans]).reshape(-1, 2).astype(np.int64)
    begin = np.repeat(lengths.cumsum() - lengths, [len(each) // 2 for each in spans])
    change = np.zeros(int(lengths.sum()) + 1, dtype=np.int64)
    np.add.at(change, begin + np.maximum(edges[:, 0] - 1, 0), 1)
    np.add.at(change, begin + edges[:, 1] - 1, -1)
    return change.cumsum()[:-1] > 0


def supervise(tokens: torch.Tensor, spans: np.ndarray) -> torch.Tensor:
    """Labels of one document: the next token within the spans, IGNORE elsewhere."""
    learnt = torch.from_numpy(supervised([spans], np.array([len(tokens) - 1])))
    return torch.where(learnt, tokens[1:], IGNORE)


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
    passes = 1  # how often an update is learnt from

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
    def capacity(self) -> int:
        """Places of a packed row."""
        assert self.rows.packing is not None
        return self.rows.packing.capacity

    @property
    def tokens_per_row(self) -> float:
        """Real (non-padding) tokens of a row, on average; 0 where nobody knows yet."""
        packing = self.rows.packing
        return 0.0 if packing is None else packing.capacity * packing.efficiency

    @cached_property
    def beside(self) -> "Loader | None":
        """The same updates of the rows beside; None where there are none."""
        return None if self.rows.beside is None else replace(self, rows=self.rows.beside)

    def prompts(self, limit: int) -> list[list[int]]:
        return self.rows.prompts(limit)

    def samples(self) -> tuple[str, str] | None:
        """Nothing of an update needs to be read by people; scripts/inspect_data.py shows rows."""
        return None

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch, (len(rows),)."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def rows_before(self, position: int) -> np.ndarray:
        """Numbers of the rows, each once, that stand before a position, or before the end where that comes first."""
        left = min(position, self.total_rows)
        if left >= len(self.rows):
            return np.arange(len(self.rows))
        return np.sort(self.row_order(0)[:left])

    def row_at(self, position: int) -> int:
        if position >= self.total_rows:
            return EMPTY_ROW
        epoch, place = divmod(position, len(self.rows))
        return int(self.row_order(epoch)[place])

    def update(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the update whose first global row is `position`."""
        return [self.rows.collate([self.row_at(each) for each in here]) for here in self.positions(position)]

    def positions(self, position: int) -> list[list[int]]:
        """The same as positions of single rows, one that has no row (total_rows) where an update is over."""
        together = self.batch_size * self.world_size
        firsts = (micro * together + self.rank * self.batch_size for micro in range(self.accumulation_steps))
        of_update = (range(first, first + self.batch_size) for first in firsts)
        return [[position + i if i < self.rows_per_update else self.total_rows for i in here] for here in of_update]


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
        filled = f"{rows.packing.efficiency:.1%}" if rows.packing else "-"
        lines.append([name, *(f"{count:,}" for count in counts), filled])
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
