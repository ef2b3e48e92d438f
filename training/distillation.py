"""How far a student's next token is from a teacher's, and the gradient of that by the student's logits.

    p      softmax of the teacher's logits / T       q      softmax of the student's logits / T

    forward_kl    sum p log(p / q)              Hinton et al. 2015, arXiv:1503.02531, section 2
    reverse_kl    sum q log(q / p)              the direction of MiniLLM: Gu et al. 2023, arXiv:2306.08543
    jsd           beta sum p log(p / m) + (1 - beta) sum q log(q / m), m = beta p + (1 - beta) q
                                                GKD: Agarwal et al. 2023, arXiv:2306.13649, equation 1

All are taken at every token of the answers that are there: the data's, or those that the student draws (--on_policy).
With drawn ones this is GKD with its lambda at 1, as a mean over all tokens; GKD takes a mean over each answer first. No
gradient goes through the drawing. MiniLLM's has one more term, of what a token leads to, which is not here.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.gpt import Losses

Divergences = Literal["forward_kl", "reverse_kl", "jsd"]


class Divergence(NamedTuple):
    value: Tensor  # (tokens,), nats
    gradient: Tensor  # (tokens, vocabulary), of each by the student's logits / T


def forward_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """Of (tokens, vocabulary) each, as all three. Where the teacher puts mass the student must."""
    p = log_p.exp()
    return Divergence((p * (log_p - log_q)).sum(-1), log_q.exp() - p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """The student keeps to what the teacher finds likely, and may leave some of that out."""
    q, ratio = log_q.exp(), log_q - log_p
    value = (q * ratio).sum(-1)
    return Divergence(value, q * (ratio - value[:, None]))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Divergence:
    """Between the two: divided by beta it goes to forward_kl as beta goes to 0, by 1 - beta to reverse_kl as it goes
    to 1. At 0.5 it is Jensen and Shannon's, at most log 2."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    q, ratio = log_q.exp(), log_q - log_m
    student = (q * ratio).sum(-1)
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    return Divergence(beta * teacher + (1 - beta) * student, (1 - beta) * q * (ratio - student[:, None]))


class TopK(NamedTuple):
    """What a teacher finds likeliest, of a temperature that is fixed by then."""

    ids: Tensor  # int64 (tokens, k)
    logps: Tensor  # float32 (tokens, k + 1): log p of each, nats, and of all other tokens together

    def part(self, part: slice) -> "TopK":
        return TopK(self.ids[part], self.logps[part])

    def completed(self, log_q: Tensor) -> Tensor:
        """log p of the whole vocabulary, (tokens, vocabulary): the mass that is left lies over the other tokens in the
        student's own proportions.

        Every divergence is then that of k + 1 outcomes, "one of the others" being the last, and its gradient too: what
        the teacher did not say draws the student nowhere. With all of the vocabulary nothing is left, and p is exact.
        """
        left = log_q.scatter(1, self.ids, -torch.inf).logsumexp(-1, keepdim=True)
        return (log_q + (self.logps[:, -1:] - left)).scatter(1, self.ids, self.logps[:, :-1])


class Distance(NamedTuple):
    """(1 - ce_weight) T^2 divergence + ce_weight cross-entropy, of every token.

    T^2 is Hinton's, for forward_kl: gradients of softened logits shrink by 1 / T^2, and so keep their size beside the
    cross-entropy's, which is taken at T = 1. The other two shrink alike, and their sources have no T, so it is theirs
    as well.
    """

    divergence: Divergences = "forward_kl"
    beta: float = 0.5  # of jsd
    temperature: float = 1.0
    ce_weight: float = 0.0

    @property
    def share(self) -> float:
        """What the divergence is multiplied by."""
        return (1 - self.ce_weight) * self.temperature**2

    def function(self) -> Callable[[Tensor, Tensor], Divergence]:
        plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
        return plain.get(self.divergence) or partial(jsd, beta=self.beta)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T), at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def distilled(logits: Tensor, targets: Tensor, teacher: Tensor | TopK, distance: Distance) -> Losses:
    """A chunk's losses.

    logits: (tokens, vocabulary), the student's; targets: int64 (tokens,); teacher: (tokens, vocabulary), its logits, or
    its likeliest tokens.
    """
    log_q = softened(logits, distance.temperature)
    said = teacher.completed(log_q) if isinstance(teacher, TopK) else softened(teacher, distance.temperature)
    soft = distance.function()(said, log_q)
    hard = log_q if distance.temperature == 1 else softened(logits, 1.0)
    nll = -hard.gather(1, targets[:, None])[:, 0]
    loss = distance.share * soft.value + distance.ce_weight * nll
    gradient = soft.gradient * (distance.share / distance.temperature)
    if distance.ce_weight:
        onehot = torch.zeros_like(gradient).scatter_(1, targets[:, None], 1.0)
        gradient += distance.ce_weight * (hard.exp() - onehot)
    return Losses(loss, gradient.to(logits.dtype), nll)
