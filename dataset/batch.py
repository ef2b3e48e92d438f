"""Tensors of one fixed shape, made of pieces of documents. Labels are shifted already, once, for all stages.

documents [<s> a b </s>] and [<s> c </s>] in a row of 6:
    input_ids     <s>  a    b    <s>  c    pad
    labels        a    b    </s> c    </s> -100
    position_ids  0    1    2    0    1    0        a document starts wherever this is 0; so does every pad
    cu_seqlens    0 3 5 6                           where one sequence of tokens ends and the next begins
    learnt        0 1 2 3 4                         places with a label, of all rows end to end

a pair of prompt [<s> p q] and answers [a b </s>], [c </s>], whose prompt is computed once:
    input_ids     <s>  p    q    a    b    q    c   the second answer begins with the prompt's last token,
    labels        -100 -100 a    b    </s> c    </s>    which has its first one as label
    position_ids  0    1    2    3    4    2    3   a branch starts wherever positions jump back
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


@dataclass
class Batch:
    """A micro-batch. Tensors are int64 (rows, sequence) where nothing else is said."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor  # int32: cumulative lengths of the sequences attention runs along, the last one repeated
    longest: int  # no sequence has more tokens
    learnt: Tensor  # int64 (supervised,): places, of the rows end to end, whose label is learnt
    row_ids: list[int]  # numbers of the packed rows, to name them when something goes wrong
    real_tokens: int  # places that are not padding
    supervised: int  # labels that are learnt
    # where answers stand behind one prompt, which is computed once: the place of every token of the sequences, each of
    # which is a prompt and one answer, int64 (tokens,); and which of these tokens belongs to a place, int64 (rows *
    # sequence,)
    places: Tensor | None = field(default=None, kw_only=True)
    tokens: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, input_ids: Tensor, labels: Tensor, position_ids: Tensor, row_ids: list[int], real_tokens: int) -> Self:
        """A batch of rows from anywhere: the rest follows from labels and positions."""
        starts = (position_ids == 0).flatten().nonzero()[:, 0]
        learnt = (labels != IGNORE).flatten().nonzero()[:, 0]
        return cls(
            input_ids, labels, position_ids, cu_seqlens=F.pad(starts, (0, 1), value=labels.numel()).int(),
            longest=labels.shape[1], learnt=learnt, row_ids=row_ids, real_tokens=real_tokens, supervised=len(learnt),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass
class PairBatch(Batch):
    """A micro-batch of preference pairs; both answers of a pair are always in it, behind one prompt. One of labelled
    answers is the same, with one answer in a pair.

    segment: int64 (rows, sequence): 2 * pair for places whose label belongs to the chosen answer, 2 * pair + 1 for
        the rejected one, -1 elsewhere; pairs are numbered within the batch.
    reference: float32 (pairs, 2), log-probability of chosen and rejected under the frozen starting model, nats; (pairs,
        0) for a loss without a reference.
    """

    segment: Tensor
    pair_ids: list[int]  # numbers of the pairs in the data
    n_answers: int  # two a pair, or one where it lacks one
    reference: Tensor

    @property
    def n_pairs(self) -> int:
        return len(self.pair_ids)


@dataclass
class RolloutBatch(Batch):
    """A micro-batch of answers that the model drew itself, in groups behind one prompt each. Its labels are the drawn
    tokens; what a tool said between them is read only. Tensors are float32 (supervised,), one number a drawn token,
    where nothing else is said.

    advantages: how much better it was to draw this token than what was expected.
    drawn_at: log-probability at which it was drawn, nats.
    reference: its log-probability under the frozen starting model, nats.
    answer: int64 (supervised,): the number of its answer within the batch.
    lengths: int64 (answers,): drawn tokens of every answer.
    tallies: float32 (n,): sums over the answers drawn, those that are not learnt among them; their names are known to
        who drew them.
    """

    advantages: Tensor
    drawn_at: Tensor
    reference: Tensor
    answer: Tensor
    lengths: Tensor
    tallies: Tensor

    @property
    def n_answers(self) -> int:
        return len(self.lengths)


@dataclass
class ValuedBatch(RolloutBatch):
    """The same, with what a critic said. Both are float32 (supervised,).

    values: of what was said before each drawn token, when that was drawn.
    returns: what the critic should have said.
    """

    values: Tensor
    returns: Tensor
