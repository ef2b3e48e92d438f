"""Tensors of one fixed shape, made of pieces of documents. Labels are shifted already, once, for all stages.

documents [<s> a b </s>] and [<s> c </s>] in a row of 6:
    input_ids     <s>  a    b    <s>  c    pad
    labels        a    b    </s> c    </s> -100
    position_ids  0    1    2    0    1    0        a document starts wherever this is 0; so does every pad
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Batch:
    """A micro-batch. Tensors are int64 (rows, sequence)."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    row_ids: list[int]  # numbers of the packed rows, to name them when something goes wrong
    real_tokens: int  # places that are not padding
    supervised: int  # labels that are learnt

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass
class PairBatch(Batch):
    """A micro-batch of preference pairs; both answers of a pair are always in it.

    segment: int64 (rows, sequence): 2 * pair for places whose label belongs to the chosen answer, 2 * pair + 1 for
        the rejected one, -1 elsewhere; pairs are numbered within the batch.
    reference: float32 (pairs, 2), log-probability of chosen and rejected under the frozen starting model, nats.
    """

    segment: Tensor
    pair_ids: list[int]  # numbers of the pairs in the data
    reference: Tensor

    @property
    def n_pairs(self) -> int:
        return len(self.pair_ids)
