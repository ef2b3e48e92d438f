"""What is optimised: what the network said of a batch in, a SUM and its weight out. Means are taken once an update.

    NextToken   sum of -log p(next token), weight = supervised tokens
    DPO         sum over pairs of a loss of preference.py, -log sigmoid(beta * margin) say, weight = pairs
    KTO         sum over answers that are judged one by one, weight = answers
    BradleyTerry    sum over pairs of -log sigmoid(score(chosen) - score(rejected)), weight = pairs
    Distillation    sum of how far the student is from its teacher, weight = supervised tokens
    PPO         the same with a critic, and the critic's own sum over drawn tokens
    GRPO        sum over drawn tokens of a loss of policy.py, weight = tokens, or answers

An objective never calls the network: the engine does, and hands over its `Output`. It returns (loss to differentiate,
{name: summed statistic}); `metrics` turns the sums over all micro-batches and ranks into what is logged. At the end
stands the table of stages; their flags are in stages.py.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from dataset import CONVERSATION, LABELLED, PAIR, PROMPT, SCORED, TEXT
from dataset.batch import Batch, PairBatch, RolloutBatch, ValuedBatch
from dataset.forms import Form
from evaluation.rewards import labels_of
from model.gpt import Places, SummedLoss, nll_by_place, score_by_place, summed_nll
from training import policy
from training.config import Config
from training.critic import clipped_value_loss
from training.distillation import Distance, Divergences, TopK, distilled
from training.metrics import Record
from training.preference import LOSSES, Answers, Referred, log_sigmoid, margin_of, own_flags
from training.stages import DistillConfig, DPOConfig, GRPOConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from training.teacher import Said, TaughtBatch, Teacher

Sums = dict[str, Tensor]
Measured = tuple[dict[str, float], float]  # an objective's sums, and the weight that they are divided by
B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


class Output(NamedTuple):
    """What the network said of a batch. It grows by a field where a network says more (a router's loss, a value)."""

    nll: Tensor  # float32 (rows, sequence): -log p(label), nats, 0 where there is no label; or () their sum
    loss: Tensor | None = None  # float32 (): the sum of another loss, of an objective whose criterion makes one
    score: Tensor | None = None  # float32 (rows, sequence): of a head of one row, 0 where nothing is learnt


class Objective(Protocol[B_contra]):
    names: tuple[str, ...]  # of the summed statistics, "loss" first
    unit: str  # what is weighed, where that is not tokens; "" else
    only_held_out: tuple[str, ...]  # metrics that are worth a line for held-out rows alone

    def criterion(self, places: Places, batch: B_contra) -> tuple[Tensor, ...]:
        """What the network is to make of the places that learn, which becomes an Output: the sum of -log p where no
        more is looked at, which costs less than the single ones, or a loss of the objective's own."""

    def weight(self, batch: B_contra) -> int:
        """What a sum over this batch is divided by."""

    def __call__(self, output: Output, batch: B_contra) -> tuple[Tensor, Sums]: ...

    def informed(self, beside: Callable[[], Measured]) -> Self:
        """Itself, or a copy that knows what it has to know of an update (or a validation) before that is looked at:
        `beside()` asks the network, without gradients, about the rows that the source has beside those."""

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Sums over a whole update (or validation) -> what is logged."""

    def warnings(self, record: Record) -> list[str]:
        """What a logged record of training gives cause to say."""


class Usual:
    """What most objectives have in common: nothing has to be known ahead of an update, nothing is worth a warning, and
    all metrics are worth a line."""

    only_held_out: tuple[str, ...] = ()

    def informed(self, beside: Callable[[], Measured]) -> Self:
        return self

    def warnings(self, record: Record) -> list[str]:
        return []


# Next token ----------------------------------------------------------------------------------------------------------


class NextToken(Usual):
    """Cross-entropy of the next token (pretraining and SFT).

    token_bytes: int (vocabulary,), UTF-8 bytes of every token; with it `bpb` (bits per byte) is reported as well.
    """

    unit = ""
    criterion = staticmethod(summed_nll)
    only_held_out: tuple[str, ...] = ("bpb",)

    def __init__(self, token_bytes: Tensor | None = None):
        self.token_bytes = token_bytes
        self.names: tuple[str, ...] = ("loss",) if token_bytes is None else ("loss", "bytes")

    def weight(self, batch: Batch) -> int:
        return batch.supervised

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Sums]:
        loss = output.nll.sum()
        sums = {"loss": loss.detach()}
        if self.token_bytes is not None:
            if self.token_bytes.device != loss.device:
                self.token_bytes = self.token_bytes.to(loss.device)
            sums["bytes"] = (self.token_bytes[batch.labels.clamp(min=0)] * (batch.labels >= 0)).sum()
        return loss, sums

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        metrics = {"loss": sums["loss"] / max(1.0, weight)}
        if sums.get("bytes"):
            metrics["bpb"] = sums["loss"] / math.log(2) / sums["bytes"]
        return metrics


# Direct preference optimization --------------------------------------------------------------------------------------


def by_answer(places: Tensor, batch: PairBatch) -> Tensor:
    """Sums over each answer's places: (rows, sequence) -> (pairs, 2), chosen first."""
    sums = places.new_zeros(2 * batch.n_pairs + 1)
    # places outside the answers carry segment -1 and land in a last entry that is dropped
    segment = torch.where(batch.segment < 0, 2 * batch.n_pairs, batch.segment)
    return sums.index_add(0, segment.flatten(), places.flatten())[:-1].view(batch.n_pairs, 2)


def answer_logps(output: Output, batch: PairBatch) -> Tensor:
    """Summed log-probability of every answer, nats: (pairs, 2), chosen first. A sum, not a mean over its length."""
    return -by_answer(output.nll, batch)


def answer_lengths(batch: PairBatch) -> Tensor:
    """Tokens of every answer that are learnt: float32 (pairs, 2), 0 where a pair lacks one."""
    return by_answer((batch.segment >= 0).float(), batch)


class DPO(Usual):
    """Preference tuning on pairs, by one of the losses of preference.py; by default DPO (Rafailov et al. 2023,
    arXiv:2305.18290).

    With nll_weight, a pair's loss also has nll_weight * -log p(chosen) / tokens of chosen (RPO's loss: Pang et al.
    2024, arXiv:2404.19733, section 2), against answers that become unlikely while their margin grows.
    """

    names: tuple[str, ...] = (
        "loss",
        "reward_accuracy",
        "chosen_reward",
        "rejected_reward",
        "chosen_logp",
        "rejected_logp",
        "chosen_nll",
    )
    unit = "pairs"
    criterion = staticmethod(nll_by_place)
    kl = 0.0  # nats; see KTO

    def __init__(self, beta: float | None = None, loss_type: str = "sigmoid", nll_weight: float = 0.0, **flags: float):
        """beta, flags: those that the loss reads; its own defaults where they are not given."""
        self.loss = LOSSES[loss_type](**flags | ({} if beta is None else {"beta": beta}))
        self.nll_weight = nll_weight

    def weight(self, batch: PairBatch) -> int:
        return batch.n_pairs

    def __call__(self, output: Output, batch: PairBatch) -> tuple[Tensor, Sums]:
        answers = Answers(answer_logps(output, batch), batch.reference, answer_lengths(batch), self.kl)
        rewards, logps = self.loss.rewards(answers), answers.logps
        nll = -logps[:, 0] / answers.lengths[:, 0].clamp(min=1)
        loss = (self.loss(rewards, answers) + self.nll_weight * nll).sum()
        kept = rewards.detach()
        sums = {
            "loss": loss.detach(),
            "reward_accuracy": self.loss.right(kept, answers).sum(),
            "chosen_reward": kept[:, 0].sum(),
            "rejected_reward": kept[:, 1].sum(),
            "chosen_logp": logps.detach()[:, 0].sum(),
            "rejected_logp": logps.detach()[:, 1].sum(),
            "chosen_nll": nll.detach().sum(),
        }
        return loss, sums

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over pairs; chosen_nll is nats a token. `drift` is the mean change of the chosen answers'
        log-probability since the start, nats; without a reference there is none."""
        return self.compared({name: value / max(1.0, weight) for name, value in sums.items()})

    def compared(self, means: dict[str, float]) -> dict[str, float]:
        means["reward_margin"] = means["chosen_reward"] - means["rejected_reward"]
        if isinstance(self.loss, Referred):
            means["drift"] = means["chosen_reward"] / self.loss.beta
        return means

    def warnings(self, record: Record) -> list[str]:
        """Where preference training does nothing, or too much. What becomes of answers is measured (answers.py)."""
        step, found = record["step"], []
        if step < 20:
            return []
        if abs(record["reward_margin"]) < 1e-3 and record["lr"] > 0:
            margin = record["reward_margin"]
            found.append(f"reward_margin is {margin:.1e} at step {step}: nothing moves; raise --learning_rate")
        elif record["reward_accuracy"] == 1.0 and record["loss"] < 0.01:
            found.append(
                f"loss {record['loss']:.4f} with every pair right at step {step}: saturated; "
                "lower --learning_rate or --epochs, or raise --beta"
            )
        return found


class KTO(DPO):
    """Preference tuning on answers that are judged one by one: what is called chosen is desirable, rejected is not.

    A pair of its batches may lack one of the two. `kl` is the loss's z0, in nats: the mean log-ratio of the mismatched
    answers that the rows of an update have beside them, 0 where it is negative.
    """

    names = (*DPO.names, "kl", "chosen_answers")
    unit = "answers"

    def weight(self, batch: PairBatch) -> int:
        return batch.n_answers

    def informed(self, beside: Callable[[], Measured]) -> Self:
        sums, weight = beside()
        assert isinstance(self.loss, Referred)
        told = copy.copy(self)
        rewards = sums["chosen_reward"] + sums["rejected_reward"]
        told.kl = max(0.0, rewards / self.loss.beta / max(1.0, weight))
        return told

    def __call__(self, output: Output, batch: PairBatch) -> tuple[Tensor, Sums]:
        loss, sums = super().__call__(output, batch)
        there = answer_lengths(batch) > 0
        return loss, sums | {"kl": self.kl * there.sum(), "chosen_answers": there[:, 0].sum()}

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over answers, or over those of a kind (no number where there are none); reward_accuracy is the share of
        answers whose reward is on its side of beta * kl."""
        chosen = sums["chosen_answers"]
        of_kind = {"chosen": chosen or math.nan, "rejected": weight - chosen or math.nan}
        means = {name: value / of_kind.get(name.partition("_")[0], max(1.0, weight)) for name, value in sums.items()}
        del means["chosen_answers"]
        return self.compared(means)


def preference(config: DPOConfig) -> DPO:
    """The objective of a config's loss."""
    flags = {name: getattr(config, name) for name in own_flags(config.loss_type)}
    kind = KTO if LOSSES[config.loss_type].single else DPO
    return kind(loss_type=config.loss_type, nll_weight=config.nll_weight, **flags)


# Reward model --------------------------------------------------------------------------------------------------------


class BradleyTerry(Usual):
    """A score for every answer, from pairs: P(chosen is preferred) = sigmoid(s(chosen) - s(rejected)) (Bradley & Terry
    1952; of reward models: Ouyang et al. 2022, arXiv:2203.02155, equation 1).

    loss = -log sigmoid(s(w) - s(l)) + center_weight (s(w) + s(l))^2

    Pairs say nothing of where zero is. The second term puts the mean of scores there (Eisenstein et al. 2023,
    arXiv:2312.09244, equation 6).
    """

    names: tuple[str, ...] = ("loss", "reward_accuracy", "chosen_reward", "rejected_reward")
    unit = "pairs"
    criterion = staticmethod(score_by_place)

    def __init__(self, center_weight: float = 0.0):
        self.center_weight = center_weight

    def weight(self, batch: PairBatch) -> int:
        return batch.n_pairs

    def __call__(self, output: Output, batch: PairBatch) -> tuple[Tensor, Sums]:
        assert output.score is not None
        scores = by_answer(output.score, batch)  # the one place of each that has a score
        loss = (-log_sigmoid(margin_of(scores)) + self.center_weight * scores.sum(1) ** 2).sum()
        kept = scores.detach()
        return loss, {
            "loss": loss.detach(),
            "reward_accuracy": (margin_of(kept) > 0).sum(),
            "chosen_reward": kept[:, 0].sum(),
            "rejected_reward": kept[:, 1].sum(),
        }

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over pairs."""
        means = {name: value / max(1.0, weight) for name, value in sums.items()}
        return means | {"reward_margin": means["chosen_reward"] - means["rejected_reward"]}

    def warnings(self, record: Record) -> list[str]:
        """Where training and held-out rows part: a score that is sure and wrong is worse than none to learn from."""
        step, loss, held_out = record["step"], record["loss"], record.get("val_loss", 0.0)
        if held_out < math.log(2) or loss > 0.1:
            return []
        return [
            f"val_loss is {held_out:.3f} at step {step}, worse than no opinion's ({math.log(2):.3f}), and loss is "
            f"{loss:.3f}: rows are learnt by heart; lower --epochs or --learning_rate, or give more rows"
        ]


# Distillation --------------------------------------------------------------------------------------------------------


class Distillation(Usual):
    """To be near a teacher at every supervised token (training/distillation.py has the formulas).

    teacher: asked about batches that do not bring along what it says (`TaughtBatch`).
    """

    names: tuple[str, ...] = ("loss", "ce_loss")
    unit = ""

    def __init__(
        self,
        loss: Divergences = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        teacher: Teacher | None = None,
    ):
        self.distance, self.teacher = Distance(loss, beta, temperature, ce_weight), teacher

    def criterion(self, places: Places, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of -log p, sum of the losses); no more than a chunk of either's logits is there at a time."""
        if isinstance(batch, TaughtBatch):
            said: Said | TopK = TopK(batch.teacher_ids, batch.teacher_logps)
        else:
            assert self.teacher is not None
            said = self.teacher.ask(batch, places.hidden)
        function, targets, distance = places.compiled(distilled), places.targets, self.distance
        loss, nll = SummedLoss.apply(
            places.hidden, places.weight,
            lambda logits, part: function(logits, targets[part], said.part(part), distance),
        )  # fmt: skip
        return nll, loss

    def weight(self, batch: Batch) -> int:
        return batch.supervised

    def __call__(self, output: Output, batch: Batch) -> tuple[Tensor, Sums]:
        assert output.loss is not None  # the criterion's
        return output.loss, {"loss": output.loss.detach(), "ce_loss": output.nll}

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over tokens, nats: `ce_loss` is what SFT calls its loss, of drawn answers how unlikely they were to the
        student itself; `divergence` has no T^2 in it."""
        metrics = {name: value / max(1.0, weight) for name, value in sums.items()}
        hard = self.distance.ce_weight * metrics["ce_loss"]
        return metrics | {"divergence": (metrics["loss"] - hard) / self.distance.share}


# Reinforcement learning ----------------------------------------------------------------------------------------------


TALLIES = (
    "answers", "groups", "reward", "reward_std", "zero_variance", "distinct", "length", "truncated", "entropy",
    "pass_at_1", "pass_at_8",
)  # fmt: skip
"""What is counted of the answers drawn, before the parts of the reward, in the order of a RolloutBatch's tallies."""
CALLS = ("calls", "failed_calls")
"""The same of those that may call tools, behind the parts."""
SUMMED_OVER = {
    "reward_std": "groups", "zero_variance": "groups", "pass_at_1": "groups", "pass_at_8": "groups",
    "entropy": "length",
}  # fmt: skip
"""What a tally is divided by, where that is not answers."""


def nll_at(places: Places, batch: object = None, *, temperature: float) -> tuple[Tensor]:
    """As nll_by_place, of softmax(logits / temperature)."""
    return nll_by_place(places._replace(hidden=places.hidden / temperature))


class GRPO(Usual):
    """To draw the answers again that were better than others to the same prompt, by one of the losses of policy.py.

    kl: weight of the divergence from the starting model, k3 at every token; it is measured where it is 0, too.
    temperature: that the answers were drawn at. All probabilities are those of softmax(logits / temperature), which is
        what the tokens were drawn from: a gradient of any other distribution's would be another policy's.
    parts: of the reward, by what they are logged as. tools: whether answers may call some.
    """

    only_held_out: tuple[str, ...] = ("pass_at_1", "pass_at_8")

    def __init__(
        self,
        loss_type: str = "dapo",
        kl: float = 0.0,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        parts: Sequence[str] = (),
        tools: bool = False,
        **flags: float,
    ):
        """flags: those that the loss reads; its own defaults where they are not given."""
        self.loss = policy.LOSSES[loss_type](**flags)
        self.kl, self.temperature, self.most = kl, temperature, max_new_tokens
        self.tallies = (*TALLIES, *(f"{part}_reward" for part in parts), *(CALLS if tools else ()))
        self.names: tuple[str, ...] = ("loss", "tokens", "kl", "clipped", "gap", *self.tallies)
        self.unit = "answers" if self.loss.per_answer else ""

    def criterion(self, places: Places, batch: RolloutBatch) -> tuple[Tensor]:
        return nll_at(places, batch, temperature=self.temperature)

    def weight(self, batch: RolloutBatch) -> int:
        return self.loss.weight(batch.supervised, batch.n_answers, self.most)

    def __call__(self, output: Output, batch: RolloutBatch) -> tuple[Tensor, Sums]:
        logps = -output.nll.flatten()[batch.learnt]
        tokens = policy.Tokens(logps, batch.drawn_at, batch.advantages, batch.answer, batch.lengths)
        divergence = policy.k3(logps if self.kl else logps.detach(), batch.reference)
        by_token = self.loss(tokens) + self.kl * divergence if self.kl else self.loss(tokens)
        loss, kept = (by_token * self.loss.share(tokens)).sum(), logps.detach()
        sums = {
            "loss": loss.detach(),
            "tokens": torch.ones_like(kept).sum(),
            "kl": divergence.detach().sum(),
            "clipped": self.loss.clips(tokens._replace(logps=kept)).sum(),
            "gap": (kept - batch.drawn_at).abs().sum(),
        }
        return loss, sums | dict(zip(self.tallies, batch.tallies, strict=True))

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means. Over learnt tokens: `kl` to the starting model, nats; `clip_share`; `logp_gap`, the mean distance of a
        token's log-probability from that at which it was drawn, nats, which before anything is learnt is rounding. Over
        drawn tokens: `entropy`, nats. Over groups: `reward_std`, the share without variance, pass@1 and pass@8. Over
        answers all else: `distinct` is the share that differs from those before it in its group, `truncated` the share
        that did not end by itself."""
        learnt = max(1.0, sums["tokens"])
        metrics = {name: sums[name] / max(1.0, sums[SUMMED_OVER.get(name, "answers")]) for name in self.tallies}
        metrics |= {"kl": sums["kl"] / learnt, "clip_share": sums["clipped"] / learnt, "logp_gap": sums["gap"] / learnt}
        del metrics["answers"], metrics["groups"]
        there = {name: value for name, value in metrics.items() if not math.isnan(value)}  # pass@8 of fewer answers
        return {"loss": sums["loss"] / max(1.0, weight)} | there

    def warnings(self, record: Record) -> list[str]:
        """Where there is nothing to learn from."""
        if record["zero_variance"] < 1:
            return []
        return [
            f"at step {record['step']} all answers of every group had the same reward ({record['reward']:.3g} on "
            "average), so nothing was learnt: give a higher --temperature, a larger --group_size, or a --reward that "
            "tells these answers apart"
        ]


def policy_of(config: GRPOConfig) -> GRPO:
    """The objective of a config's loss."""
    flags = {name: getattr(config, name) for name in own_flags(config.loss_type, policy.LOSSES)}
    return GRPO(
        config.loss_type, config.kl, config.temperature, config.max_new_tokens, labels_of(config.reward),
        bool(config.tools), **flags,
    )  # fmt: skip


class Critic(Usual):
    """To say of every place what reward is to come: the clipped value loss, a mean over drawn tokens."""

    names: tuple[str, ...] = ("loss", "tokens", "error", "returns", "squares")
    unit = ""
    criterion = staticmethod(score_by_place)

    def __init__(self, value_clip: float = 0.2):
        self.value_clip = value_clip

    def weight(self, batch: ValuedBatch) -> int:
        return batch.supervised

    def __call__(self, output: Output, batch: ValuedBatch) -> tuple[Tensor, Sums]:
        assert output.score is not None
        values = output.score.flatten()[batch.learnt]
        loss = clipped_value_loss(values, batch.values, batch.returns, self.value_clip).sum()
        sums = {"loss": loss.detach(), "tokens": torch.ones_like(batch.returns).sum()}
        sums["error"] = ((values.detach() - batch.returns) ** 2).sum()
        return loss, sums | {"returns": batch.returns.sum(), "squares": (batch.returns**2).sum()}

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over drawn tokens; `explained` is the share of the returns' variance that values account for, 1 at best
        and below 0 where their mean would do better."""
        n = max(1.0, sums["tokens"])
        variance = sums["squares"] / n - (sums["returns"] / n) ** 2
        return {
            "value_loss": sums["loss"] / max(1.0, weight),
            "explained": 1 - sums["error"] / n / variance if variance > 1e-12 else 0.0,
        }


class PPO(Usual):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347): the clipped policy loss, a mean over drawn
    tokens, with advantages that a critic has a part in; and the critic's own loss. Each is that of a network of its own
    (engines/actor_critic.py). It does not warn as GRPO does: a group whose answers are alike still teaches, since a
    critic expects something else."""

    unit = ""
    only_held_out = GRPO.only_held_out

    def __init__(self, policy: GRPO, critic: Critic, gamma: float = 1.0, gae_lambda: float = 0.95):
        self.policy, self.critic, self.gamma, self.gae_lambda = policy, critic, gamma, gae_lambda
        self.names: tuple[str, ...] = (*policy.names, *(f"critic_{name}" for name in critic.names))

    def criterion(self, places: Places, batch: ValuedBatch) -> tuple[Tensor, ...]:
        return self.policy.criterion(places, batch)

    def weight(self, batch: ValuedBatch) -> int:
        return self.policy.weight(batch)

    def __call__(self, output: Output, batch: ValuedBatch) -> tuple[Tensor, Sums]:
        raise AssertionError("two networks are asked, each with its own objective")

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        own = {name.removeprefix("critic_"): value for name, value in sums.items() if name.startswith("critic_")}
        return self.policy.metrics(sums, weight) | self.critic.metrics(own, weight)


def ppo_of(config: PPOConfig) -> PPO:
    """DAPO's loss is PPO's with other bounds: clipped, and a mean over tokens."""
    clipped = GRPO(
        "dapo", config.kl, config.temperature, config.max_new_tokens, labels_of(config.reward), bool(config.tools),
        clip_low=config.clip_low, clip_high=config.clip_high,
    )  # fmt: skip
    return PPO(clipped, Critic(config.value_clip), config.gamma, config.gae_lambda)


# The stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a stage is made of, beside its entry script and its recipes."""

    config: type[Config]
    form: Form  # of its rows
    objective: Callable[[Any], "Objective[Any]"]  # of its config
    rows: Callable[[Any], Form] | None = None  # of its config, where that decides which form its rows have
    # whether it is measured and checked where nothing else is said: not where a teacher stands beside the model or
    # rollouts are needed, nor where batches and network are nearly another stage's
    alone: bool = True

    def form_for(self, config: Config) -> Form:
        return self.rows(config) if self.rows else self.form

    @property
    def script(self) -> str:
        return f"train_{self.config.stage}.py"


STAGES: dict[str, Stage] = {
    stage.config.stage: stage
    for stage in (
        Stage(PretrainConfig, TEXT, lambda config: NextToken()),
        Stage(SFTConfig, CONVERSATION, lambda config: NextToken()),
        Stage(DPOConfig, PAIR, preference, lambda config: LABELLED if LOSSES[config.loss_type].single else PAIR),
        Stage(
            DistillConfig,
            CONVERSATION,
            lambda config: Distillation(
                config.distill_loss, config.jsd_beta, config.distill_temperature, config.ce_weight
            ),
            lambda config: PROMPT if config.on_policy else CONVERSATION,
            alone=False,
        ),
        Stage(RewardConfig, SCORED, lambda config: BradleyTerry(config.center_weight), alone=False),
        Stage(GRPOConfig, PROMPT, policy_of, alone=False),
        Stage(PPOConfig, PROMPT, ppo_of, alone=False),
    )
}
"""In the order in which they are run; distill in the place of full_sft, reward beside dpo."""
ALONE = {name: stage for name, stage in STAGES.items() if stage.alone}
"""What is measured and checked without more than the sample data."""
