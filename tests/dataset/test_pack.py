"""The packer: every token once, no row too long, hardly any padding, the same rows every time."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.pack import FULL_ENOUGH, Packing, pack

LENGTHS = st.lists(st.integers(0, 70), max_size=80)
CAPACITY = st.integers(1, 40)


def pieces(packing: Packing) -> list[list[tuple[int, int, int]]]:
    """Rows of (document, start, length)."""
    every = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist(), strict=True))
    edges = packing.offsets.tolist()
    return [every[a:b] for a, b in pairwise(edges)]


def packed_one_by_one(lengths: list[int], capacity: int, split: bool) -> list[list[tuple[int, int, int]]]:
    """The same rows, a piece at a time: of those that fit the longest, and of these the one that was put there last."""
    rows, shelf = [], []
    for document, length in enumerate(lengths):
        whole = length // capacity * capacity if length > capacity else 0
        rows += [[(document, start, capacity)] for start in range(0, whole, capacity)]
        shelf += [(document, whole, length - whole)] if length > whole else []
    while shelf:
        row, room = [], capacity
        while fitting := [piece for piece in shelf if piece[2] <= room]:
            longest = max(length for _, _, length in fitting)
            row.append([piece for piece in fitting if piece[2] == longest][-1])
            shelf.remove(row[-1])
            room -= longest
        if split and shelf and room > (1 - FULL_ENOUGH) * capacity:
            shortest = min(length for _, _, length in shelf)
            document, start, length = [piece for piece in shelf if piece[2] == shortest][-1]
            shelf.remove((document, start, length))
            row.append((document, start, room))
            shelf.append((document, start + room, length - room))
        rows.append(row)
    return rows


def check(lengths: list[int], capacity: int, packing: Packing) -> None:
    """Every token of every document is in exactly one piece, and no row is empty or over capacity."""
    rows = pieces(packing)
    assert len(rows) == len(packing)
    assert all(0 < sum(length for _, _, length in row) <= capacity for row in rows)
    placed = sorted(piece for row in rows for piece in row)
    tokens = [(document, start + i) for document, start, length in placed for i in range(length)]
    assert tokens == [(document, i) for document, length in enumerate(lengths) for i in range(length)]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, CAPACITY)
def test_with_splitting_every_token_stands_once(lengths, capacity):
    check(lengths, capacity, pack(lengths, capacity, split=True))


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(70, 200))
def test_without_splitting_every_document_stands_whole(lengths, capacity):
    packing = pack(lengths, capacity, split=False)
    check(lengths, capacity, packing)
    assert not packing.start.any()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, CAPACITY)
def test_the_same_lengths_give_the_same_rows(lengths, capacity):
    before = np.array(lengths, dtype=np.int64)
    given_array = before.copy()
    assert pieces(pack(given_array, capacity, split=True)) == pieces(pack(lengths, capacity, split=True))
    assert np.array_equal(given_array, before)


FEW_LENGTHS = st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 21]), max_size=120)  # whose rows are alike


@settings(max_examples=200, deadline=None)
@given(LENGTHS | FEW_LENGTHS, CAPACITY)
def test_rows_that_are_alike_are_those_made_one_by_one(lengths, capacity):
    assert pieces(pack(lengths, capacity, split=True)) == packed_one_by_one(lengths, capacity, split=True)
    short = [min(length, capacity) for length in lengths]
    assert pieces(pack(short, capacity, split=False)) == packed_one_by_one(short, capacity, split=False)


def test_the_example_of_the_module():
    assert pieces(pack([5, 3, 9], 8, split=True)) == [[(2, 0, 8)], [(0, 0, 5), (1, 0, 3)], [(2, 8, 1)]]


def lengths_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return {
        "short": rng.integers(1, 40, 4000),
        "around a row": rng.integers(200, 600, 2000),
        "all just over half a row": np.full(2000, 257),
        "of every size": np.exp(rng.normal(5, 1.5, 3000)).astype(int) + 1,
    }[kind]


@pytest.mark.parametrize("kind", ["short", "around a row", "all just over half a row", "of every size"])
def test_with_splitting_98_percent_of_the_places_hold_a_token(kind):
    packing = pack(lengths_of(kind), 512, split=True)
    assert packing.efficiency >= 0.98
    assert packing.efficiency == pytest.approx(lengths_of(kind).sum() / (len(packing) * 512))


def test_few_documents_are_cut():
    """Only what is longer than a row must be cut; the rest is cut only to fill a hole."""
    lengths = np.random.default_rng(0).integers(1, 400, 3000)
    packing = pack(lengths, 512, split=True)
    assert np.count_nonzero(packing.start) < 0.05 * len(lengths)


def test_nothing_gives_no_rows():
    assert len(pack([], 8, split=True)) == len(pack([0, 0], 8, split=False)) == 0


def test_a_document_that_fits_no_row_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than a row of 8"):
        pack([3, 9], 8, split=False)
