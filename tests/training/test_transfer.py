"""What passes between host and device: tensors through one buffer and back, numbers that are read later."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.batch import Batch
from dataset.loader import EMPTY_ROW, PairRows, TextRows
from tests.conftest import encoded
from training.transfer import ALIGNED, Deferred, Transfer, pack, tensors_of, unpack

DOCUMENTS = [[1, 21, 22, 23, 24, 2], [1, 31, 32, 33, 2], [1, 41, 42, 2]]


def text() -> list[Batch]:
    rows = TextRows(encoded(ids=DOCUMENTS), 7, 3)
    return [rows.collate([0, EMPTY_ROW]), rows.collate([1])]


def pairs() -> list[Batch]:
    rows = PairRows(encoded(chosen=DOCUMENTS, rejected=DOCUMENTS[::-1], prompt=[2, 1, 2]), 8, 3)
    rows.reference = np.linspace(-9, -1 / 3, 6, dtype=np.float32).reshape(3, 2)
    return [rows.collate([row]) for row in range(len(rows))]


@dataclass(kw_only=True)
class More(Batch):
    """Fields of every kind of number, of lengths that do not fit each other's alignment."""

    flags: Tensor
    lengths: Tensor
    turned: Tensor
    nothing: Tensor
    one: Tensor
    half: Tensor
    double: Tensor


def more() -> list[Batch]:
    (batch, _) = text()
    return [
        More(
            **vars(batch),
            flags=torch.tensor([True, False, True]),
            lengths=torch.tensor([0, 3, 7], dtype=torch.int32),
            turned=torch.arange(14).view(2, 7).T,  # not contiguous
            nothing=torch.zeros(0, dtype=torch.long),
            one=torch.tensor(2**31 - 1),
            half=torch.tensor([1 / 3, -0.0, torch.inf], dtype=torch.bfloat16),
            double=torch.tensor([torch.nan, 1 / 3], dtype=torch.float64),
        )
    ]


@pytest.mark.parametrize("make", [text, pairs, more])
def test_tensors_come_out_of_one_buffer_as_they_went_in(make) -> None:
    tensors = [tensor for batch in make() for tensor in tensors_of(batch).values()]
    flat, places = pack(tensors)
    found = unpack(flat, places)
    assert len(found) == len(tensors) > 5
    for before, after in zip(tensors, found, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
        assert after.dtype == before.dtype and after.shape == before.shape
        assert torch.equal(after.signbit(), before.signbit()) or not after.is_floating_point()


def test_every_tensor_of_a_batch_travels_and_whole_numbers_in_half_the_bytes() -> None:
    (batch,) = pairs()[:1]
    tensors = tensors_of(batch)
    assert set(tensors) == {field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor)}
    assert set(tensors) >= {"input_ids", "labels", "position_ids", "segment", "reference"}
    flat, _ = pack(list(tensors.values()))
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    assert size <= len(flat) < size + ALIGNED * len(tensors) and flat.dtype == torch.uint8


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1])
def test_a_number_that_does_not_fit_is_an_error(number: int) -> None:
    with pytest.raises(ValueError, match=f"a batch holds .*{number}.*int32"):
        pack([torch.tensor([0, number])])


@pytest.mark.parametrize("make", [text, pairs, more])
def test_on_a_cpu_nothing_is_copied(make) -> None:
    batches = make()
    sent = Transfer(torch.device("cpu")).send(batches)
    arrived = sent.arrived()
    assert all(a is b for a, b in zip(arrived, batches, strict=True)) and sent.there is None


def test_deferred_numbers_are_what_their_tensor_held() -> None:
    deferred = Deferred(torch.tensor([1.5, torch.inf, 1 / 3], dtype=torch.float64), lambda numbers: numbers[1:])
    assert deferred.read() == deferred.read() == [torch.inf, 1 / 3]
