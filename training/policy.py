"""The losses of reinforcement learning: what a token's answer was worth and how likely it was in, a loss a token out.

    rewards of a group    1  0  0  1        four answers to one prompt
    advantages           .5 -.5 -.5 .5      group_advantages: each answer's beside its group's mean

    dapo        a mean over the tokens of the whole update (the default)
    grpo        a mean over answers of each one's mean over its tokens
    dr_grpo     a sum over tokens, divided by answers times --max_new_tokens
    cispo       as dapo, with the ratio clipped as a weight, so that no token's gradient is lost
    gspo        as grpo, with one ratio an answer

A loss is a class here and its name in LOSSES. Its fields are the flags that it reads, with its own defaults; a flag
that it does not read is refused. Nothing of torch is imported before a loss is computed, since flags are checked here.

In the formulas r = pi(token) / pi_old(token) is the ratio of the model's probability of a token to that at which it was
drawn, A the advantage, |y| the drawn tokens of an answer, and all sums are over a whole update, over all processes: the
papers' means over a group, or a micro-batch, would make a gradient depend on how an update is split. How the three
that have grpo in their names differ, then, is what a token weighs: in grpo 1 / |y| of its answer, so that a long wrong
answer is punished less a token than a short one; in dapo the same for all tokens, whose number is counted; in
dr_grpo the same for all, whose number does not matter: an update of short answers has small gradients.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(NamedTuple):
    """What is known of a batch's drawn tokens: float32 (tokens,) where nothing else is said."""

    logps: "Tensor"  # under the model as it is, nats
    drawn_at: "Tensor"  # log-probability when they were drawn, nats
    advantages: "Tensor"
    answer: "Tensor"  # int64 (tokens,): the number of its answer, in the batch
    lengths: "Tensor"  # (answers,): drawn tokens

    @property
    def ratios(self) -> "Tensor":
        return (self.logps - self.drawn_at).exp()


def group_advantages(rewards: "Tensor", scale: Literal["none", "std"] = "none") -> "Tensor":
    """(groups, answers) -> the same: reward - mean of the group, exactly 0 where all are equal.

    scale "std" divides by the group's standard deviation (of a sample) + 1e-4, as GRPO does (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2); "none" does not, since that makes much of groups that hardly differ (Liu et al.
    2025, arXiv:2503.20783, section 3.1).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred * (rewards != rewards[:, :1]).any(1, keepdim=True)
    return centred if scale == "none" else centred / (deviation(rewards)[:, None] + 1e-4)


def deviation(rewards: "Tensor") -> "Tensor":
    """Standard deviation of a sample, of each group: (groups, answers) -> (groups,)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred.square().sum(1) / (rewards.shape[1] - 1)).sqrt()


def overlong_penalty(length: int, most: int, buffer: int) -> float:
    """0 up to most - buffer tokens, falling to -1 at most (DAPO: Yu et al. 2025, arXiv:2503.14476, equation 13; it
    ends there, since no answer is longer). A buffer of 0 is none."""
    return min(0.0, (most - buffer - length) / buffer) if buffer else 0.0


def k3(logps: "Tensor", reference: "Tensor") -> "Tensor":
    """An estimate of KL(pi || ref) from a token drawn from pi: ref / pi - log(ref / pi) - 1, nats, never negative and
    right on average (Schulman 2020, "Approximating KL divergence"; GRPO, equation 4)."""
    ratio = reference - logps
    return ratio.expm1() - ratio


def clipped(ratios: "Tensor", advantages: "Tensor", low: float, high: float) -> "Tensor":
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO: Schulman et al. 2017, arXiv:1707.06347, equation 7, with two
    bounds as in DAPO)."""
    return -(ratios * advantages).minimum(ratios.clamp(1 - low, 1 + high) * advantages)


def held_back(ratios: "Tensor", advantages: "Tensor", low: float, high: float) -> "Tensor":
    """bool: whether clipping leaves no gradient, since the ratio has gone as far as it may where A wants it to go."""
    return ((ratios > 1 + high) & (advantages > 0)) | ((ratios < 1 - low) & (advantages < 0))


@dataclass(frozen=True)
class PolicyLoss:
    """What every loss says of itself. Fields are the flags that it reads."""

    per_answer: ClassVar[bool] = False  # whether the weight of an update is answers, and a token weighs 1 / |y|

    def __call__(self, tokens: Tokens) -> "Tensor":
        """(tokens,), before a token's share."""
        raise NotImplementedError

    def clips(self, tokens: Tokens) -> "Tensor":
        """bool (tokens,): which ones clipping changes."""
        raise NotImplementedError

    def share(self, tokens: Tokens) -> "Tensor | float":
        """What a token's loss counts."""
        return 1 / tokens.lengths[tokens.answer].to(tokens.logps.dtype) if self.per_answer else 1.0

    def weight(self, tokens: int, answers: int, most: int) -> int:
        """What the sum over an update's tokens is divided by; `most` is the longest an answer may be."""
        return answers if self.per_answer else tokens


@dataclass(frozen=True)
class Clipped(PolicyLoss):
    """PPO's clipped surrogate, of the ratios that a loss goes by."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    def ratios(self, tokens: Tokens) -> "Tensor":
        """(tokens,)."""
        return tokens.ratios

    def __call__(self, tokens: Tokens) -> "Tensor":
        return clipped(self.ratios(tokens), tokens.advantages, self.clip_low, self.clip_high)

    def clips(self, tokens: Tokens) -> "Tensor":
        return held_back(self.ratios(tokens), tokens.advantages, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class GRPOLoss(Clipped):
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300, equation 3).

    loss = 1 / answers sum over answers 1 / |y| sum over tokens -min(r A, clip(r, 1 - low, 1 + high) A)
    """

    per_answer: ClassVar[bool] = True


@dataclass(frozen=True)
class DAPOLoss(Clipped):
    """DAPO (Yu et al. 2025, arXiv:2503.14476, equation 8): every token weighs the same, and may become likelier than
    less likely.

    loss = 1 / tokens sum over tokens -min(r A, clip(r, 1 - low, 1 + high) A)
    """

    clip_high: float = 0.28


@dataclass(frozen=True)
class DrGRPOLoss(Clipped):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2): nothing is divided by how long answers came out, nor
    by how much rewards differ (--scale_rewards none).

    loss = 1 / (answers max_new_tokens) sum over tokens -min(r A, clip(r, 1 - low, 1 + high) A)
    """

    def weight(self, tokens: int, answers: int, most: int) -> int:
        return answers * most


@dataclass(frozen=True)
class CISPOLoss(PolicyLoss):
    """CISPO (MiniMax 2025, arXiv:2506.13585, equations 4 and 5, without a lower bound, as there): the ratio is a weight
    without a gradient, and clipped as such. The paper gives no value of its bound.

    loss = 1 / tokens sum over tokens -min(r, 1 + high) A log pi(token)
    """

    clip_high: float = 4.0

    def __call__(self, tokens: Tokens) -> "Tensor":
        return -tokens.ratios.detach().clamp(max=1 + self.clip_high) * tokens.advantages * tokens.logps

    def clips(self, tokens: Tokens) -> "Tensor":
        return tokens.ratios > 1 + self.clip_high


@dataclass(frozen=True)
class GSPOLoss(Clipped):
    """Group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7; bounds of its section
    5.1): one ratio an answer, s = (pi(y) / pi_old(y))^(1 / |y|), which is clipped for all of its tokens alike.

    loss = 1 / answers sum over answers -min(s A, clip(s, 1 - low, 1 + high) A)
    """

    per_answer: ClassVar[bool] = True
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def ratios(self, tokens: Tokens) -> "Tensor":
        """Of every token its answer's."""
        sums = tokens.logps.new_zeros(len(tokens.lengths))
        sums = sums.index_add(0, tokens.answer, tokens.logps - tokens.drawn_at)
        return (sums / tokens.lengths).exp()[tokens.answer]


LOSSES: dict[str, type[PolicyLoss]] = {
    "dapo": DAPOLoss,
    "grpo": GRPOLoss,
    "dr_grpo": DrGRPOLoss,
    "cispo": CISPOLoss,
    "gspo": GSPOLoss,
}
