"""The losses of preference tuning: what the model says of a pair's answers in, a loss a pair out.

    sigmoid                 DPO                 -log sigmoid(margin), margin = reward(chosen) - reward(rejected)
    cdpo, robust, exo       DPO where some labels are wrong
    hinge, ipo              DPO by other measures of the margin
    apo_zero (apo), apo_down    answers anchored one by one
    kto                     answers judged one by one, in pairs or not
    simpo, orpo             no reference: the model's own mean log-probabilities

A loss is a class here and its name in LOSSES. Its fields are the flags that it reads, with its own defaults; a flag
that it does not read is refused. Nothing of torch is imported before a loss is computed, since flags are checked here.

In the formulas w is the chosen answer, l the rejected one, x their prompt, pi the model, ref the frozen starting model,
r(y) = beta * (log pi(y|x) - log ref(y|x)) the implicit reward, and |y| the tokens of an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import log, log1p
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Answers(NamedTuple):
    """What is known of the answers of a batch's pairs: float32 (pairs, 2), chosen first."""

    logps: "Tensor"  # summed log-probability, nats
    reference: "Tensor"  # the same under the starting model; (pairs, 0) for a loss that has no reference
    lengths: "Tensor"  # tokens; 0 where a pair lacks the answer
    kl: float = 0.0  # estimate of KL(pi || ref), nats, for a loss that asks for it

    @property
    def means(self) -> "Tensor":
        """Mean log-probability of a token, nats."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def ratios(self) -> "Tensor":
        """log pi(y|x) - log ref(y|x), nats."""
        return self.logps - self.reference


def log_sigmoid(values: "Tensor") -> "Tensor":
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def margin_of(rewards: "Tensor") -> "Tensor":
    """(pairs, 2) -> (pairs,)."""
    return rewards[:, 0] - rewards[:, 1]


@dataclass(frozen=True)
class Loss:
    """What every loss says of itself. Fields are the flags that it reads."""

    reference: ClassVar[bool] = False  # whether it compares with the starting model, which is asked for it
    single: ClassVar[bool] = False  # whether answers are judged one by one: a pair may lack one, and KL is asked for

    def rewards(self, answers: Answers) -> "Tensor":
        """The score by which an answer is better or worse: (pairs, 2)."""
        raise NotImplementedError

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        """(pairs, 2) rewards -> (pairs,) losses."""
        raise NotImplementedError

    def right(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        """How much of a pair is on the right side: (pairs,), 0 or 1 where the two answers are compared."""
        return margin_of(rewards) > 0


# With a reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Referred(Loss):
    """Rewards are measured from the starting model."""

    reference: ClassVar[bool] = True
    beta: float = 0.1

    def rewards(self, answers: Answers) -> "Tensor":
        return self.beta * answers.ratios


@dataclass(frozen=True)
class Sigmoid(Referred):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    loss = -log sigmoid(r(w) - r(l))
    """

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return -log_sigmoid(margin_of(rewards))


@dataclass(frozen=True)
class ConservativeDPO(Referred):
    """cDPO: a share e of the labels is taken to be the wrong way round (Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO"), which gives the margin a finite optimum, log((1 - e) / e).

    loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m),   m = r(w) - r(l), e = label_smoothing
    """

    label_smoothing: float = 0.1

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        margin, e = margin_of(rewards), self.label_smoothing
        return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


@dataclass(frozen=True)
class Robust(Referred):
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, section 3): in expectation over labels of which a share e
    is flipped, it is the loss of the true ones. It may be negative.

    loss = (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e),   m = r(w) - r(l), e = label_smoothing
    """

    label_smoothing: float = 0.1

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        margin, e = margin_of(rewards), self.label_smoothing
        return (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e)


@dataclass(frozen=True)
class EXO(Referred):
    """Efficient exact optimization (Ji et al. 2024, arXiv:2402.00856, equation 16): the reverse KL divergence between
    what the model thinks of two answers and what their label says, softened by e = label_smoothing.

    loss = p log(p / (1 - e)) + (1 - p) log((1 - p) / e),   p = sigmoid(r(w) - r(l))
    """

    label_smoothing: float = 1e-3

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        margin, e = margin_of(rewards), self.label_smoothing
        towards = margin.sigmoid() * (log_sigmoid(margin) - log1p(-e))
        return towards + (-margin).sigmoid() * (log_sigmoid(-margin) - log(e))


@dataclass(frozen=True)
class Hinge(Referred):
    """A margin of 1 is enough (SLiC-HF: Zhao et al. 2023, arXiv:2305.10425; with DPO's rewards in RSO: Liu et al.
    2023, arXiv:2309.06657, equation 9).

    loss = max(0, 1 - (r(w) - r(l)))
    """

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return (1 - margin_of(rewards)).relu()


@dataclass(frozen=True)
class IPO(Referred):
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, equation 17): the margin has a target,
    1 / (2 beta); beta is the paper's tau.

    loss = (h(w) - h(l) - 1 / (2 beta))^2,   h(y) = (log pi(y|x) - log ref(y|x)) / |y|

    The paper has the sum where h has the mean over the answer's tokens; its authors use the mean (as TRL says, which
    asked them), without which one target would be far for short answers and near for long ones. Rewards that are
    logged are DPO's, sums.
    """

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return (margin_of(answers.ratios / answers.lengths.clamp(min=1)) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class APOZero(Referred):
    """Anchored preference optimization (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7), for chosen answers
    that are better than the model's own: they become likelier, and rejected ones less likely, each by itself.

    loss = (1 - sigmoid(r(w))) + sigmoid(r(l))
    """

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return (-rewards[:, 0]).sigmoid() + rewards[:, 1].sigmoid()


@dataclass(frozen=True)
class APODown(Referred):
    """Anchored preference optimization (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8), for a model whose own
    answers are better than the chosen ones: both become less likely, rejected ones more so.

    loss = sigmoid(r(w)) + (1 - sigmoid(r(w) - r(l)))
    """

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return rewards[:, 0].sigmoid() + (-margin_of(rewards)).sigmoid()


# Answers one by one --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KTO(Referred):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, equations 6 to 8): every answer is
    judged by itself, desirable (w) or not (l), and the weight of an update is answers.

    loss of a desirable answer     desirable_weight * (1 - sigmoid(r(y) - beta z0))
    loss of an undesirable one     undesirable_weight * (1 - sigmoid(beta z0 - r(y)))
    z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), y' the answer to another prompt than x; it has no gradient

    The paper takes the mean over a micro-batch. Here it is that of the whole update, over all processes, so that the
    loss does not depend on how an update is split (in a validation, that of all rows it looks at); the answers y' are
    those of dataset.loader.JudgedRows.
    """

    single: ClassVar[bool] = True
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        there, zero = answers.lengths > 0, self.beta * answers.kl
        desirable = self.desirable_weight * there[:, 0] * (zero - rewards[:, 0]).sigmoid()
        return desirable + self.undesirable_weight * there[:, 1] * (rewards[:, 1] - zero).sigmoid()

    def right(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        """Of the answers of a pair, how many are on their side of z0."""
        there, over = answers.lengths > 0, rewards - self.beta * answers.kl
        return (there[:, 0] & (over[:, 0] > 0)).int() + (there[:, 1] & (over[:, 1] < 0)).int()


# Without a reference -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimPO(Loss):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, equation 6); its reward is the score by which
    answers are generated.

    loss = -log sigmoid(r(w) - r(l) - simpo_gamma),   r(y) = beta / |y| * log pi(y|x)
    """

    beta: float = 2.0
    simpo_gamma: float = 1.0

    def rewards(self, answers: Answers) -> "Tensor":
        return self.beta * answers.means

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return -log_sigmoid(margin_of(rewards) - self.simpo_gamma)


@dataclass(frozen=True)
class ORPO(Loss):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7): fine-tuning on the
    chosen answer, and a preference beside it. The logged reward is the log odds.

    loss = -log P(w) + orpo_lambda * -log sigmoid(log odds(w) - log odds(l))
    log P(y) = 1 / |y| * log pi(y|x),   odds(y) = P(y) / (1 - P(y))
    """

    orpo_lambda: float = 0.1

    def rewards(self, answers: Answers) -> "Tensor":
        means = answers.means.clamp(max=-1e-6)  # an answer that is certain has no finite odds
        return means - (-means.expm1()).log()

    def __call__(self, rewards: "Tensor", answers: Answers) -> "Tensor":
        return -answers.means[:, 0] - self.orpo_lambda * log_sigmoid(margin_of(rewards))


# The table -----------------------------------------------------------------------------------------------------------


LOSSES: dict[str, type[Loss]] = {
    "sigmoid": Sigmoid,
    "ipo": IPO,
    "hinge": Hinge,
    "robust": Robust,
    "cdpo": ConservativeDPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "kto": KTO,
    "apo": APOZero,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "exo": EXO,
}


Losses = Mapping[str, type[Any]]  # of this file, or of another family (policy.py)


def own_flags(loss_type: str, losses: Losses = LOSSES) -> dict[str, float]:
    """The flags that a loss reads, with its defaults."""
    return {field.name: getattr(losses[loss_type], field.name) for field in fields(losses[loss_type])}


def check_flags(loss_type: str, given: Mapping[str, float | None], losses: Losses = LOSSES) -> None:
    """Raise ValueError for a flag that was given and that the loss does not read."""
    for name, value in given.items():
        if value is not None and name not in own_flags(loss_type, losses):
            readers = ", ".join(other for other in losses if name in own_flags(other, losses))
            raise ValueError(
                f"--{name} is {value}, and --loss_type {loss_type} does not read it; leave it out (or give none), or "
                f"give a loss that does: {readers}"
            )
