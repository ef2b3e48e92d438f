"""Rows to batches: hand-made tensors, every row once whatever the number of ranks, every transition trained once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import Batch, Loader, build_dpo_loader, build_pretrain_loader, build_sft_loader
from dataset.batch import IGNORE
from dataset.loader import EMPTY_ROW, Column, PairRows, TextRows, describe
from tests.conftest import encoded
from tests.helpers import make_data, write_jsonl

PAD = 3
X = IGNORE


def text_rows(documents: list[list[int]], max_seq_len: int) -> TextRows:
    return TextRows(encoded(ids=documents), max_seq_len, PAD)


def numbered_documents(count: int = 40, seed: int = 0) -> list[list[int]]:
    """Documents in which no token comes twice."""
    lengths = np.random.default_rng(seed).integers(2, 30, count)
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


# --- batches by hand ---


def test_documents_in_a_row_by_hand():
    rows = text_rows([[1, 21, 22, 2], [1, 31, 2]], 6)
    batch = rows.collate([0, EMPTY_ROW])
    assert batch.input_ids.tolist() == [[1, 21, 22, 1, 31, PAD], [PAD] * 6]
    assert batch.labels.tolist() == [[21, 22, 2, 31, 2, X], [X] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert (batch.real_tokens, batch.supervised, batch.row_ids) == (5, 5, [0, EMPTY_ROW])
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids)} == {torch.int64}


def test_a_conversation_by_hand():
    """Spans 2..4 and 5..7 of 7 tokens; the label of place i is token i + 1."""
    data = encoded(ids=[[1, 5, 21, 8, 6, 31, 8]], spans=[[2, 4, 5, 7]])
    batch = TextRows(data, 8, PAD).collate([0])
    assert batch.input_ids.tolist() == [[1, 5, 21, 8, 6, 31, PAD, PAD]]
    assert batch.labels.tolist() == [[X, 21, 8, X, 31, 8, X, X]]
    assert (batch.real_tokens, batch.supervised) == (6, 4)


def test_a_span_from_the_very_first_token_has_no_label_for_it():
    batch = TextRows(encoded(ids=[[6, 31, 32]], spans=[[0, 3]]), 4, PAD).collate([0])
    assert batch.labels.tolist() == [[31, 32, X, X]]


def pair_rows() -> PairRows:
    rows = PairRows(
        encoded(
            chosen=[[1, 5, 6, 20, 8], [1, 7, 6, 40]],
            rejected=[[1, 5, 6, 30, 31, 8], [1, 7, 6, 50]],
            prompt=[3, 3],
        ),
        max_seq_len=6,
        pad_id=PAD,
    )
    rows.reference = np.array([[-1.0, -2.0], [-3.0, -4.0]], dtype=np.float32)
    return rows


def test_pairs_without_a_reference_refuse_to_be_a_batch():
    rows = pair_rows()
    rows.reference = None
    with pytest.raises(ValueError, match="no reference log-probabilities yet; fill_reference"):
        rows.collate([0])


def test_pairs_by_hand():
    """The rejected answer comes after the chosen one, from the prompt's last token on."""
    rows = pair_rows()
    assert len(rows) == 1  # 4 + 3 and 3 + 1 places of 12
    assert Loader(rows, batch_size=1).tokens_per_row == pytest.approx(11)
    batch = rows.collate([0, EMPTY_ROW])
    assert batch.input_ids.tolist() == [[1, 5, 6, 20, 6, 30, 31, 1, 7, 6, 6, PAD], [PAD] * 12]
    assert batch.labels.tolist() == [[X, X, 20, 8, 30, 31, 8, X, X, 40, 50, X], [X] * 12]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 2, 0], [0] * 12]
    assert batch.segment.tolist() == [[-1, -1, 0, 0, 1, 1, 1, -1, -1, 2, 3, -1], [-1] * 12]
    assert batch.learnt.tolist() == [2, 3, 4, 5, 6, 9, 10]
    assert (batch.pair_ids, batch.n_pairs, batch.real_tokens, batch.supervised) == ([0, 1], 2, 11, 7)
    assert batch.reference.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]


def test_the_sequences_of_pairs_by_hand():
    """Of each pair two, both with the prompt, and what is left of a row. A place belongs to the first it stands in."""
    batch = pair_rows().collate([0, EMPTY_ROW])
    ends = batch.cu_seqlens.tolist()
    places = batch.places[: ends[-1]].tolist()
    sequences = [places[start:end] for start, end in pairwise(ends)]
    expected = [[0, 1, 2, 3], [0, 1, 4, 5, 6], [7, 8, 9], [7, 8, 10], [11], list(range(12, 24))]
    assert [each for each in sequences if each] == expected
    assert [places[i] for i in batch.tokens] == list(range(24))
    assert batch.tokens[[0, 1, 4, 7, 8]].tolist() == [0, 1, 6, 9, 10]


def test_shapes_do_not_depend_on_what_is_in_the_rows():
    rows = text_rows(numbered_documents(), 16)
    for kind in (rows, pair_rows()):
        few, many = kind.collate([EMPTY_ROW]), kind.collate([0])
        shapes = [{n: v.shape for n, v in vars(b).items() if torch.is_tensor(v) and n not in ("learnt", "reference")}
                  for b in (few, many)]  # fmt: skip
        assert shapes[0] == shapes[1]


def test_several_pairs_share_a_row_in_order():
    same = [[1, 5, 20], [1, 5, 21, 22]] * 3
    rows = PairRows(encoded(chosen=same[::2], rejected=same[1::2], prompt=[2, 2, 2]), 8, PAD)
    rows.reference = np.zeros((3, 2), dtype=np.float32)
    batch = rows.collate([0])
    assert len(rows) == 1 and batch.n_pairs == 3  # 4 places each, of 16
    assert batch.segment[0].tolist() == [-1, 0, 1, 1, -1, 2, 3, 3, -1, 4, 5, 5, -1, -1, -1, -1]


def test_padding_alone_is_a_batch_of_no_pairs():
    batch = pair_rows().collate([EMPTY_ROW])
    assert batch.n_pairs == 0 and batch.reference.shape == (0, 2) and (batch.segment == -1).all()


def test_a_batch_moves_whole():
    batch = pair_rows().collate([0])
    moved = batch.to("cpu")
    assert type(moved) is type(batch) and moved.pair_ids == batch.pair_ids
    assert batch.to("meta").segment.device.type == batch.to("meta").reference.device.type == "meta"


def test_columns_read_chunks_in_place():
    documents = [[1, 2, 3], [], [4], [5, 6]]
    column = Column(encoded(ids=documents).columns, "ids")
    assert [column[i].tolist() for i in range(4)] == documents
    assert column.lengths().tolist() == [3, 0, 1, 2]


# --- what training sees ---


@pytest.mark.parametrize("max_seq_len", [4, 16, 64])
def test_every_transition_of_every_document_is_trained_exactly_once(max_seq_len):
    documents = numbered_documents()
    rows = text_rows(documents, max_seq_len)
    batch = rows.collate(list(range(len(rows))))
    taught = batch.labels != IGNORE
    found = sorted(zip(batch.input_ids[taught].tolist(), batch.labels[taught].tolist(), strict=True))
    assert found == [(a, b) for d in documents for a, b in pairwise(d)]
    assert batch.supervised == batch.real_tokens == len(found)
    starts = batch.input_ids[(batch.position_ids == 0) & taught]
    assert {d[0] for d in documents} <= set(starts.tolist())


class Walk:
    """Follows training over several worlds and notes the global order of rows."""

    def __init__(self, rows: TextRows, batch_size: int, accumulation_steps: int, epochs: float, seed: int = 0):
        self.rows, self.shape, self.seed = rows, (batch_size, accumulation_steps), seed
        self.total = round(len(rows) * epochs)
        self.position = 0
        self.seen: list[int] = []

    def go(self, world_size: int, updates: int | None = None) -> None:
        ranks = [
            Loader(self.rows, *self.shape, rank, world_size, self.seed, total_rows=self.total)
            for rank in range(world_size)
        ]
        while self.position < self.total and updates != 0:
            batches = [loader.update(self.position) for loader in ranks]
            assert {len(micro) for micro in batches} == {self.shape[1]}
            for micro in zip(*batches, strict=True):  # the global order: micro-batch by micro-batch, rank by rank
                for batch in micro:
                    assert batch.input_ids.shape == (self.shape[0], self.rows.packing.capacity)
                    self.seen += batch.row_ids
            self.position += ranks[0].rows_per_update
            updates = None if updates is None else updates - 1

    def real(self) -> list[int]:
        """The rows seen; padding comes only at the very end."""
        real = [row for row in self.seen if row != EMPTY_ROW]
        assert self.seen[: len(real)] == real
        return real


ROWS = text_rows(numbered_documents(90), 32)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_ranks_together_see_every_row_of_an_epoch_once(world_size):
    walk = Walk(ROWS, 2, 3, epochs=1)
    walk.go(world_size)
    assert sorted(walk.real()) == list(range(len(ROWS)))
    assert len(walk.seen) - len(ROWS) == -len(ROWS) % (6 * world_size)  # the last update is filled up


def test_the_order_of_rows_does_not_depend_on_the_world():
    orders = []
    for shape, world_size in [((2, 3), 1), ((6, 1), 1), ((2, 1), 3), ((1, 1), 4)]:
        walk = Walk(ROWS, *shape, epochs=2.5)
        walk.go(world_size)
        orders.append(walk.real())
    assert all(order == orders[0] for order in orders)
    assert len(orders[0]) == round(2.5 * len(ROWS))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_change_of_world_in_the_middle_repeats_and_skips_nothing(changes, batch_size, accumulation_steps, last):
    walk = Walk(ROWS, batch_size, accumulation_steps, epochs=2)
    for world_size, updates in changes:
        walk.go(world_size, updates)
    walk.go(last)
    real = walk.real()
    assert sorted(real[: len(ROWS)]) == sorted(real[len(ROWS) :]) == list(range(len(ROWS)))


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [Loader(ROWS, 1, seed=seed).order(epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert Loader(ROWS, 1, shuffle=False).order(5).tolist() == list(range(len(ROWS)))


def test_an_update_is_the_batches_the_docstring_says():
    loader = Loader(ROWS, batch_size=2, accumulation_steps=2, rank=1, world_size=2, shuffle=False)
    assert [batch.row_ids for batch in loader.update(8)] == [[10, 11], [14, 15]]


def test_an_update_past_the_last_row_is_padding():
    loader = Loader(ROWS, 4, shuffle=False, total_rows=len(ROWS))
    (batch,) = loader.update(len(ROWS) - 1)
    assert batch.row_ids == [len(ROWS) - 1, EMPTY_ROW, EMPTY_ROW, EMPTY_ROW]
    assert (batch.labels[1:] == IGNORE).all() and (batch.input_ids[1:] == PAD).all()
    assert batch.supervised == int((batch.labels[0] != IGNORE).sum()) > 0


# --- from files ---


@pytest.mark.parametrize(
    ("stage", "build", "width"),
    [("pretrain", build_pretrain_loader, 48), ("full_sft", build_sft_loader, 48), ("dpo", build_dpo_loader, 96)],
)
def test_loaders_of_the_stages(tmp_path, tokenizer, stage, build, width):
    path = make_data(tmp_path)[stage]
    loader = build(str(path), tokenizer, 48, 4, accumulation_steps=2, cache_dir=tmp_path / "cache")
    if isinstance(loader.rows, PairRows):
        loader.rows.reference = np.zeros((loader.rows.n_pairs, 2), dtype=np.float32)
    batches = loader.update(0)
    assert len(batches) == 2 and all(isinstance(batch, Batch) for batch in batches)
    assert all(batch.input_ids.shape == (4, width) for batch in batches)
    report = loader.rows.encoded.report
    everything = loader.rows.collate(list(range(len(loader.rows))))
    assert everything.supervised == report.supervised
    documents = report.used * (2 if stage == "dpo" else 1)  # each of one token more than it has labels
    shared = int(loader.rows.shared.sum()) if isinstance(loader.rows, PairRows) else 0
    assert everything.real_tokens == report.tokens - documents - shared


def test_pretraining_rows_hold_98_percent_real_tokens(tmp_path, tokenizer):
    path = make_data(tmp_path, rows=600)["pretrain"]
    loader = build_pretrain_loader(str(path), tokenizer, 128, 4, cache_dir=tmp_path / "cache")
    assert loader.rows.packing.efficiency >= 0.98


def test_files_with_nothing_to_learn_are_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match=r"empty\.jsonl: no row is left to learn from"):
        build_pretrain_loader(str(path), tokenizer, 16, 2, cache_dir=tmp_path / "cache")


def test_the_start_table(tmp_path, tokenizer):
    rows = [{"text": "\x01\x02"}, {"text": ""}, {"text": 3}]
    loader = build_pretrain_loader(
        str(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, 4, 1, on_bad_row="skip", cache_dir=tmp_path / "c"
    )
    header, lines, notes = describe({"train": loader.rows, "val": None})
    assert dict(zip(header, lines[0], strict=True)) == {
        "part": "train", "rows read": "3", "used": "1", "dropped": "1", "bad": "1", "tokens": "4", "supervised": "3",
        "packed rows": "1", "real tokens": "75.0%",
    }  # fmt: skip
    assert lines[1] == ["val", *["0"] * 7, "-"]
    assert notes[0] == "train: 1 rows dropped: empty text" and "rows.jsonl:3: found a number" in notes[1]
