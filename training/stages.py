"""The flags of each stage, beside those that all share. What each optimises, of which rows: STAGES in objectives.py.

Nothing here needs torch, so that a command line is checked before anything is imported that takes seconds.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from training import policy
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
    learning_rate: float | None = flag(
        None,
        "peak learning rate; by default that of the optimizer and of dim (docs/benchmarks.md)",
        like="learning_rate",
    )
    optimizer: Literal["adamw", "muon"] | None = flag(
        None,
        "muon: torch.optim.Muon for hidden matrices, AdamW for the rest, embeddings ten times as fast; by default "
        "muon, and adamw under DeepSpeed, whose partitions are no matrices, and for an adapter",
        like="optimizer",
    )


@dataclass(kw_only=True)
class SFTConfig(ChatConfig):
    """Supervised fine-tuning on conversations; the loss stands on the assistant's turns only."""

    stage: ClassVar[str] = "full_sft"
    previous: ClassVar[str | None] = "pretrain"
    data_path: list[str] = flag([f"{SAMPLE}/sft.jsonl"], like="data_path")
    learning_rate: float | None = flag(5e-4, like="learning_rate")
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
    learning_rate: float | None = flag(1e-5, like="learning_rate")
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


def sampling_flag(default: Any, text: str, **rule: Any) -> Any:
    """How answers are drawn: of another one, others would be drawn to the same prompts."""
    return flag(default, text, "rollouts", resume="refuse", **rule)


@dataclass(kw_only=True)
class DistillConfig(SFTConfig):
    """Fine-tuning on conversations with a larger model as teacher: the loss stands on the assistant's turns only."""

    stage: ClassVar[str] = "distill"
    splits: ClassVar[bool] = False
    batch_size: int = flag(
        16, "rows a process a micro-batch, with on_policy prompts: lower it when memory runs out", like="batch_size"
    )
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
    on_policy: bool = flag(
        False,
        "learn from the teacher on answers that the student draws itself, of every update anew; the data's own last "
        "answers are left out",
        "distillation",
        resume="refuse",
    )
    group_size: int = sampling_flag(1, "answers to every prompt", at_least=1)
    max_new_tokens: int = sampling_flag(256, "tokens an answer may have", at_least=1)
    temperature: float = sampling_flag(1.0, "of drawing answers, in training and validation", above=0)

    def __post_init__(self) -> None:
        """Every update of drawn answers has shapes of its own, so compiling is off where nobody asks for it."""
        if self.on_policy and self.compile is None:
            self.compile = False

    def check(self) -> None:
        """As Config.check, and ValueError for what drawn answers do not go with, and what goes with them alone."""
        super().check()
        refused, why = ["group_size", "max_new_tokens", "temperature"], "whose answers are the data's"
        if self.on_policy:
            refused, why = ["teacher_top_k", "ce_weight"], "whose answers nobody has before they are drawn"
        given = [name for name in refused if getattr(self, name) != getattr(type(self), name)]
        if given:
            told = ", ".join(f"--{name} {getattr(self, name)}" for name in given)
            raise ValueError(
                f"{told}: not with --on_policy {str(self.on_policy).lower()}, {why}; leave one of them out"
            )


@dataclass(kw_only=True)
class RewardConfig(ChatConfig):
    """A reward model: a score for every answer, learnt from pairs of answers."""

    stage: ClassVar[str] = "reward"
    previous: ClassVar[str | None] = "full_sft"
    scores: ClassVar[bool] = True
    data_path: list[str] = flag([f"{SAMPLE}/reward.jsonl"], like="data_path")
    batch_size: int = flag(4, like="batch_size", text=rules(DPOConfig)["batch_size"].help)
    learning_rate: float | None = flag(1e-4, like="learning_rate")
    weight_decay: float = flag(0.0, like="weight_decay")
    center_weight: float = flag(
        0.01,
        "how much of (score of chosen + score of rejected)^2 is added to a pair's loss, which keeps the mean of scores "
        "near 0 (0: off)",
        "reward model",
        at_least=0,
        resume="refuse",
    )


def rollout_flag(default: Any, text: str, *, resume: str = "refuse", **rule: Any) -> Any:
    """A change of one would give other answers to the same prompts, or other worth to them."""
    return flag(default, text, "reinforcement", resume=resume, **rule)


@dataclass(kw_only=True)
class RolloutConfig(ChatConfig):
    """What the stages share that learn from answers which the model draws itself."""

    splits: ClassVar[bool] = False
    previous: ClassVar[str | None] = "full_sft"
    data_path: list[str] = flag([f"{SAMPLE}/grpo.jsonl"], like="data_path")
    batch_size: int = flag(
        16, "prompts a process a micro-batch, each with its group of answers: lower it when memory runs out",
        like="batch_size",
    )  # fmt: skip
    global_batch_size: int = flag(
        0,
        "prompts an update over all processes, kept whatever their number; sets accumulation_steps (0: off)",
        like="global_batch_size",
    )
    learning_rate: float | None = flag(1e-5, like="learning_rate")
    weight_decay: float = flag(0.0, like="weight_decay")
    compile: bool | None = flag(False, "torch.compile the blocks: every update has shapes of its own", like="compile")
    eval_interval: int = flag(50, like="eval_interval")
    eval_rows: int = flag(64, "prompts a validation looks at, at most (0: all)", like="eval_rows")
    eval_answers: int = flag(16, like="eval_answers")
    sample_interval: int = flag(10, "steps between groups of answers that are shown (0: none)", like="sample_interval")

    reward: list[str] = rollout_flag(
        ["world"],
        "what an answer is worth, one or several: exact_match, number, contains, overlap, whole, format, "
        "length:N, world, reward_model:FOLDER, or file.py:function",
    )
    reward_weights: list[float] = rollout_flag([], "what each reward counts; by default 1")
    pass_reward: float | None = rollout_flag(
        None,
        "an answer of this reward passes, in pass_at_1 and pass_at_8; by default the sum of the positive weights",
        resume="free",
    )
    group_size: int = sampling_flag(8, "answers to every prompt", at_least=2)
    max_new_tokens: int = sampling_flag(256, "tokens an answer may have", at_least=1)
    temperature: float = sampling_flag(1.0, "of drawing answers, in training and validation", above=0)
    tools: list[str] = rollout_flag(
        [],
        "what answers may call: calculator, lookup, or file.py:function, and NAME= before one for another name; the "
        "data's rows tell the model of them",
    )
    max_turns: int = rollout_flag(4, "turns of the model in an answer that calls tools", at_least=1)
    overlong_buffer: int = rollout_flag(
        0,
        "so many tokens before max_new_tokens a penalty begins to grow, to 1 for an answer that is cut (DAPO; 0: none)",
        at_least=0,
    )
    eval_group_size: int = rollout_flag(
        8, "answers to every held-out prompt; pass_at_8 takes 8 or more", resume="free", at_least=2
    )
    inner_epochs: int = rollout_flag(1, "updates from the same answers, of which the first is on-policy", at_least=1)
    kl: float = rollout_flag(
        0.0, "weight of the divergence from the starting model; it is measured in any case", at_least=0
    )

    def check(self) -> None:
        """As Config.check, and ValueError for what does not fit together."""
        super().check()
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(
                f"--overlong_buffer is {self.overlong_buffer}; it must be less than --max_new_tokens "
                f"{self.max_new_tokens}, so that some answers have no penalty"
            )
        if len(self.reward_weights) not in (0, len(self.reward)):
            raise ValueError(
                f"--reward names {len(self.reward)} rewards and --reward_weights {len(self.reward_weights)} weights; "
                "give one weight for each, or none"
            )


@dataclass(kw_only=True)
class GRPOConfig(RolloutConfig):
    """Reinforcement learning: answers that were better than others to the same prompt become likelier."""

    stage: ClassVar[str] = "grpo"
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo", "gspo"] = rollout_flag(
        "dapo", "the loss, each with its paper in training/policy.py: dapo is a mean over the tokens of an update"
    )
    scale_rewards: Literal["none", "std"] = rollout_flag(
        "none", "whether a group's advantages are divided by the standard deviation of its rewards"
    )
    clip_low: float | None = rollout_flag(
        None, "how far below 1 a token's ratio may fall; by default 0.2, in gspo 3e-4; not in cispo", above=0, below=1
    )
    clip_high: float | None = rollout_flag(
        None, "how far above 1 it may rise; by default 0.2, in dapo 0.28, in cispo 4, in gspo 4e-4", above=0
    )
    filter_groups: bool = rollout_flag(
        False, "leave groups without variance out of the update, its weight included (DAPO, without drawing others)"
    )

    def __post_init__(self) -> None:
        """What the loss reads and nobody gave has the loss's own default."""
        for name, default in own_flags(self.loss_type, policy.LOSSES).items():
            if getattr(self, name) is None:
                setattr(self, name, default)

    def check(self) -> None:
        """As RolloutConfig.check, and ValueError for a bound that the loss does not have."""
        super().check()
        clips = {name: getattr(self, name) for name in ("clip_low", "clip_high")}
        check_flags(self.loss_type, clips, policy.LOSSES)


@dataclass(kw_only=True)
class PPOConfig(RolloutConfig):
    """Reinforcement learning with a critic: tokens that led to more than was expected become likelier."""

    stage: ClassVar[str] = "ppo"
    critic: str | None = rollout_flag(
        None,
        "reward model that the critic starts from, a folder or the name of a run in out_dir; by default the policy's "
        "own network with a new head",
        by_node=True,
        resume="free",  # its weights are part of what a run is
    )
    critic_learning_rate: float | None = rollout_flag(
        None, "peak learning rate of the critic; by default learning_rate", resume="note", above=0
    )
    gamma: float = rollout_flag(1.0, "what a reward counts a token earlier", above=0)
    gae_lambda: float = rollout_flag(
        0.95, "how far an advantage looks ahead instead of trusting the critic: 0 a token, 1 to the answer's end",
        at_least=0,
    )  # fmt: skip
    clip_low: float = rollout_flag(0.2, "how far below 1 a token's ratio may fall", above=0, below=1)
    clip_high: float = rollout_flag(0.2, "how far above 1 it may rise", above=0)
    value_clip: float = rollout_flag(
        0.2, "how far a value may go in the updates from the same answers (0: as far as it likes)", at_least=0
    )

    def check(self) -> None:
        """As RolloutConfig.check, and ValueError for what a critic cannot do."""
        super().check()
        if self.gamma > 1 or self.gae_lambda > 1:
            raise ValueError(f"--gamma {self.gamma} and --gae_lambda {self.gae_lambda} must be at most 1")
        if self.offload == "nvme":
            raise ValueError("--offload nvme has room for one network, and PPO has two; give --offload cpu")
