"""The flags of each stage, beside those that all share. What each optimises, of which rows: STAGES in objectives.py.

Nothing here needs torch, so that a command line is checked before anything is imported that takes seconds.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from training.config import SAMPLE, ChatConfig, Config, flag, rules
from training.preference import LOSSES, check_flags, own_flags


def loss_flag(
    text: str, *, at_least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A number that some losses read; a loss that does says its default (preference.py)."""
    return flag(None, text, "preference", resume="refuse", at_least=at_least, above=above, below=below)


@dataclass(kw_only=True)
class PretrainConfig(Config):
    """Next-token training on plain text."""

    stage: ClassVar[str] = "pretrain"
    chats: ClassVar[bool] = False
    data_path: list[str] = flag([f"{SAMPLE}/pretrain.jsonl"], like="data_path")


@dataclass(kw_only=True)
class SFTConfig(ChatConfig):
    """Supervised fine-tuning on conversations; the loss stands on the assistant's turns only."""

    stage: ClassVar[str] = "full_sft"
    previous: ClassVar[str | None] = "pretrain"
    data_path: list[str] = flag([f"{SAMPLE}/sft.jsonl"], like="data_path")
    learning_rate: float = flag(5e-4, like="learning_rate")
    epochs: float = flag(2.0, like="epochs")


@dataclass(kw_only=True)
class DPOConfig(ChatConfig):
    """Preference tuning on pairs of answers, or on labelled ones."""

    stage: ClassVar[str] = "dpo"
    previous: ClassVar[str | None] = "full_sft"
    data_path: list[str] = flag([f"{SAMPLE}/dpo.jsonl"], like="data_path")
    batch_size: int = flag(
        4, "rows a process a micro-batch; a row is 2 * max_seq_len wide and holds whole pairs", like="batch_size"
    )
    learning_rate: float = flag(1e-5, like="learning_rate")
    weight_decay: float = flag(0.0, like="weight_decay")
    eval_answers: int = flag(16, like="eval_answers")
    loss_type: Literal[
        "sigmoid", "ipo", "hinge", "robust", "cdpo", "simpo", "orpo", "kto", "apo", "apo_zero", "apo_down", "exo"
    ] = flag(
        "sigmoid",
        "the loss, each with its paper in training/preference.py: sigmoid is DPO, apo is apo_zero; simpo and orpo have "
        "no reference; kto learns from rows of one labelled answer too",
        "preference",
        resume="refuse",
    )
    beta: float | None = loss_flag(
        "strength of the pull towards the reference (larger: closer); by default 0.1, in simpo, where it scales the "
        "reward, 2; not in orpo",
        above=0,
    )
    label_smoothing: float | None = loss_flag(
        "robust, cdpo, exo: share of the labels taken to be the wrong way round; by default 0.1, in exo 0.001",
        above=0,
        below=0.5,
    )
    simpo_gamma: float | None = loss_flag("simpo: margin that the rewards are to have; by default 1", at_least=0)
    orpo_lambda: float | None = loss_flag(
        "orpo: weight of the odds ratio beside the chosen answer's likelihood; by default 0.1", above=0
    )
    desirable_weight: float | None = loss_flag(
        "kto: weight of a desirable answer; by default 1. Weight times number is best about equal on both sides",
        at_least=0,
    )
    undesirable_weight: float | None = loss_flag("kto: weight of an undesirable answer; by default 1", at_least=0)
    nll_weight: float = flag(
        0.0,
        "how much of the chosen answer's mean negative log-likelihood is added to a pair's loss, so that what is "
        "preferred is also kept likely (RPO); 1 is a good start where answers suffer",
        "preference",
        at_least=0,
        resume="refuse",
    )

    def __post_init__(self) -> None:
        """What the loss reads and nobody gave has the loss's own default."""
        for name, default in own_flags(self.loss_type).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

    def check(self) -> None:
        """As Config.check, and ValueError for a flag that the loss does not read."""
        super().check()
        check_flags(self.loss_type, {name: getattr(self, name) for name in LOSS_FLAGS})


LOSS_FLAGS = sorted({name for loss_type in LOSSES for name in own_flags(loss_type)})


@dataclass(kw_only=True)
class DistillConfig(SFTConfig):
    """Fine-tuning on conversations with a larger model as teacher: the loss stands on the assistant's turns only."""

    stage: ClassVar[str] = "distill"
    teacher: str | None = flag(
        None,
        "folder of the model to learn from, or the name of a run in out_dir; it must have the student's vocabulary",
        "distillation",
        by_node=True,
    )
    distill_loss: Literal["forward_kl", "reverse_kl", "jsd"] = flag(
        "forward_kl",
        "how far the student is from its teacher at every token: KL(teacher, student), KL(student, teacher), or the "
        "generalised Jensen-Shannon divergence between the two",
        "distillation",
        resume="refuse",
    )
    jsd_beta: float = flag(
        0.5, "jsd: near 0 like forward_kl, near 1 like reverse_kl", "distillation", above=0, below=1, resume="refuse"
    )
    distill_temperature: float = flag(
        1.0, "divides both logits in the divergence, which is multiplied by its square", "distillation", above=0,
        resume="refuse",
    )  # fmt: skip
    ce_weight: float = flag(
        0.0,
        "share of the cross-entropy with the data's own tokens; the divergence has the rest",
        "distillation",
        at_least=0,
        below=1,
        resume="refuse",
    )
    teacher_top_k: int = flag(
        0,
        "ask the teacher ahead of training for its so many likeliest tokens, and cache them: less work and memory in "
        "every pass, 8 bytes a token and place on disk (0: ask it in training for all)",
        "distillation",
        at_least=0,
        resume="refuse",
    )


@dataclass(kw_only=True)
class RewardConfig(ChatConfig):
    """A reward model: a score for every answer, learnt from pairs of answers."""

    stage: ClassVar[str] = "reward"
    previous: ClassVar[str | None] = "full_sft"
    scores: ClassVar[bool] = True
    data_path: list[str] = flag([f"{SAMPLE}/reward.jsonl"], like="data_path")
    batch_size: int = flag(4, like="batch_size", text=rules(DPOConfig)["batch_size"].help)
    learning_rate: float = flag(1e-4, like="learning_rate")
    weight_decay: float = flag(0.0, like="weight_decay")
    center_weight: float = flag(
        0.01,
        "how much of (score of chosen + score of rejected)^2 is added to a pair's loss, which keeps the mean of scores "
        "near 0 (0: off)",
        "reward model",
        at_least=0,
        resume="refuse",
    )
