"""Prompts in, answers of the model as it is out, judged and laid into micro-batches: a source of what is learnt from.

    rollouts.update(position=32)     of the global prompts 32 to 48 this rank's, each with a group of answers
    -> [RolloutBatch]                labels: the drawn tokens; advantages: what each answer was worth beside its group

A position is a count of prompts since the start of training, and a source's whole state: answers are drawn by numbers
that follow from the seed, the prompt's position and the answer's place in its group, never from a rank, so that a
resumed run, on whatever number of ranks, draws those again that were in flight. The whole network is asked for from the
engine once an update; who trains a sharded one gathers it for that long.

`roll_out` alone needs no engine: it is what else wants answers in groups (pairs of the best and the worst, a teacher's
word on what its student writes). `Rollouts` gives plain batches of them, `Judged` those of policy gradients.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import Loader, TextTokenizer
from dataset.batch import Batch, RolloutBatch
from dataset.loader import EMPTY_ROW, PromptRows, branches, cumulative, lay_out, tensors
from evaluation import Reward
from evaluation.reward_model import judges
from evaluation.tools import build_tools
from model import GPT
from model.adapters import switched_off
from model.draw import draw
from model.folder import assemble
from training.adapting import newly_adapted
from training.engines.contract import Engine
from training.engines.pytorch import ask
from training.groups import Answer, Group, Sampling, add_turn, uniform
from training.objectives import nll_at
from training.policy import deviation, group_advantages, overlong_penalty
from training.setup import Data, Start
from training.stages import DistillConfig, GRPOConfig, RolloutConfig
from training.tool_turns import NO_TOOLS, Toolbox, count_calls, take_turns

HELD_OUT = 2**32  # added to the seed that held-out answers are drawn by
AsItBegan = Callable[[GPT], AbstractContextManager[GPT]]  # of the network as it is, the one that training began with


def roll_out(
    network: GPT, tokenizer: TextTokenizer, prompts: Sequence[Sequence[int]], keys: Sequence[int], how: Sampling
) -> list[list[Answer]]:
    """A group of answers to each prompt. keys: a number of each prompt's own, that its answers are drawn by."""
    if not prompts:
        return []
    uniforms = torch.stack([uniform(how, key, answer) for key in keys for answer in range(how.group_size)])
    drawn = draw(
        network, prompts, uniforms, copies=how.group_size, max_new_tokens=how.max_new_tokens,
        temperature=how.temperature, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    answers = [add_turn(Answer(), each, tokenizer) for each in drawn]
    return [answers[first : first + how.group_size] for first in range(0, len(answers), how.group_size)]


# Into batches --------------------------------------------------------------------------------------------------------


def lay_groups(groups: Sequence[Group], pad_id: int) -> dict[str, Any]:
    """What every batch of groups holds (Batch): one row, in which each prompt stands once, its first answer
    behind it, then the others, from the prompt's last token on. No place is padding, unless there are no groups."""
    runs: list[np.ndarray] = []
    firsts, leaders, drawn = [], [], []
    for group in groups:
        leader, shared = len(runs), len(group.prompt) - 1
        for i, answer in enumerate(group.answers):
            first = shared if i else 0
            runs.append(np.array(group.prompt[first:] + answer.ids, dtype=np.int64))
            firsts.append(first)
            leaders.append(leader)
            drawn += [False] * (shared - first) + answer.drawn
    shape = (1, max(1, len(drawn)))
    first_places = np.array(firsts, dtype=np.int64)
    laid = lay_out(runs, first_places, np.zeros(len(runs), dtype=np.int64), shape)
    places, lengths, tokens = branches(laid, first_places, np.array(leaders, dtype=np.int64), shape)
    return tensors(laid, np.array(drawn, dtype=bool), shape, pad_id) | {
        "cu_seqlens": cumulative(lengths.cumsum(), len(lengths)),
        "longest": int(lengths.max()),
        "places": torch.from_numpy(places),
        "tokens": torch.from_numpy(tokens),
        "row_ids": [group.number for group in groups],
        "real_tokens": len(drawn),
    }


class Rollouts:
    """Answers of the model as it is to prompts in the order of a loader: a Source of plain batches."""

    ahead = False  # the next answers are those of the weights that this update leaves
    beside = None
    passes = 1
    tokens_per_row = 0.0  # nobody knows before they are written

    def __init__(
        self, loader: Loader, engine: Engine, tokenizer: TextTokenizer, how: Sampling, box: Toolbox = NO_TOOLS
    ):
        assert isinstance(loader.rows, PromptRows)
        self.loader, self.rows, self.engine, self.tokenizer, self.how = loader, loader.rows, engine, tokenizer, how
        self.box = box
        self.rows_per_update, self.total_rows = loader.rows_per_update, loader.total_rows  # prompts
        self.rows_per_epoch = loader.rows_per_epoch

    def prompts(self, limit: int) -> list[list[int]]:
        return self.rows.prompts(limit)

    def update(self, position: int) -> list[Batch]:
        """Every rank takes part, also one that has no prompt left. All of its answers are drawn side by side: their
        cache is small beside what learning from a micro-batch takes."""
        parts = self.loader.positions(position)
        with self.engine.generator() as network:
            groups = {group.key: group for group in self.answered([each for part in parts for each in part], network)}
            return [self.batch([groups[each] for each in part if each in groups], network) for part in parts]

    def answered(self, positions: list[int], network: GPT) -> list[Group]:
        """The prompts at these positions, with their answers; no more than there are."""
        numbers = {each: self.loader.row_at(each) for each in positions}
        keys = [each for each, number in numbers.items() if number != EMPTY_ROW]
        prompts = [self.rows.ids(numbers[key]) for key in keys]
        drawn = roll_out(network, self.tokenizer, prompts, keys, self.how)
        groups = [
            Group(number := numbers[key], key, prompt, self.rows.row(number), self.rows.where(number), answers)
            for key, prompt, answers in zip(keys, prompts, drawn, strict=True)
        ]
        if self.box.tools:
            take_turns(network, self.tokenizer, groups, self.how, self.box)
        return groups

    def batch(self, groups: list[Group], network: GPT) -> Batch:
        return Batch(**lay_groups(groups, self.rows.pad_id))

    def samples(self) -> tuple[str, str] | None:
        return None


# Judged --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judging:
    """What answers are worth."""

    reward: Reward
    pass_reward: float  # an answer of that much or more passes
    scale_rewards: Literal["none", "std"] = "none"
    overlong_buffer: int = 0  # tokens
    filter_groups: bool = False


class Judged(Rollouts):
    """Answers with their advantages: reward beside the group's mean, as GRPO has it."""

    def __init__(
        self, loader: Loader, engine: Engine, tokenizer: TextTokenizer, how: Sampling, judging: Judging,
        as_it_began: AsItBegan, passes: int = 1, box: Toolbox = NO_TOOLS,
    ):  # fmt: skip
        super().__init__(loader, engine, tokenizer, how, box)
        self.judging, self.as_it_began, self.passes = judging, as_it_began, passes
        self.shown: tuple[str, str] | None = None

    def batch(self, groups: list[Group], network: GPT) -> RolloutBatch:
        rewards, tallies = self.judge(groups)
        advantages = group_advantages(rewards, self.judging.scale_rewards).float()
        if self.judging.filter_groups:
            kept = (advantages != 0).any(1).tolist()
            groups = [group for group, keep in zip(groups, kept, strict=True) if keep]
            advantages = advantages[kept]
        return self.lay(groups, advantages, tallies, network)

    def lay(self, groups: list[Group], advantages: Tensor, tallies: Tensor, network: GPT) -> RolloutBatch:
        """advantages: (groups, answers); all tokens of an answer have its."""
        answers = [answer for group in groups for answer in group.answers]
        lengths = torch.tensor([len(answer.logps) for answer in answers], dtype=torch.int64)
        answer = torch.repeat_interleave(torch.arange(len(answers)), lengths)
        drawn_at = torch.tensor([logp for each in answers for logp in each.logps], dtype=torch.float32)
        batch = RolloutBatch(
            **lay_groups(groups, self.rows.pad_id), advantages=advantages.flatten()[answer], drawn_at=drawn_at,
            reference=drawn_at, answer=answer, lengths=lengths, tallies=tallies,
        )  # fmt: skip
        batch.reference = self.reference(batch, network)
        return batch

    def judge(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """Rewards, float64 (groups, answers), and what is counted of these answers (objectives.TALLIES)."""
        judging, size = self.judging, self.how.group_size
        samples = [sample for group in groups for sample in group.samples()]
        scores = judging.reward(samples)
        answers = [answer for group in groups for answer in group.answers]
        penalties = [
            overlong_penalty(len(answer.logps), self.how.max_new_tokens, judging.overlong_buffer) for answer in answers
        ]
        total = torch.tensor(scores.total, dtype=torch.float64).view(len(groups), size)
        rewards = total + torch.tensor(penalties, dtype=torch.float64).view(len(groups), size)
        if groups:
            self.shown = shown(groups[0], rewards[0].tolist())
        right = (total >= judging.pass_reward - 1e-9).sum(1).tolist()
        counted = [
            len(answers),
            len(groups),
            float(rewards.sum()),
            float(deviation(rewards).sum()),
            float((rewards == rewards[:, :1]).all(1).sum()),
            sum(len({tuple(answer.ids) for answer in group.answers}) for group in groups),
            sum(len(answer.logps) for answer in answers),
            sum(answer.finish_reason == "length" for answer in answers),
            sum(answer.entropy for answer in answers),
            *(sum(pass_at(k, passed, size) for passed in right) for k in (1, 8)),
            *(sum(values) for values in scores.parts.values()),
            *(count_calls(answers) if self.box.tools else ()),
        ]
        return rewards, torch.tensor(counted, dtype=torch.float32)

    @torch.no_grad()
    def reference(self, batch: RolloutBatch, network: GPT) -> Tensor:
        """What the starting model says of the drawn tokens, float32 (supervised,), nats."""
        engine, here = self.engine, batch.to(self.engine.device)
        autocast = torch.autocast(engine.device.type, dtype=engine.dtype, enabled=engine.dtype != torch.float32)
        with self.as_it_began(network) as start, autocast:
            said = ask(start, here, partial(nll_at, temperature=self.how.temperature))
        return -said.nll.flatten()[here.learnt].cpu()

    def samples(self) -> tuple[str, str] | None:
        return self.shown


def pass_at(k: int, right: int, drawn: int) -> float:
    """The chance that one of k answers passes, where `right` of those drawn did: 1 - C(drawn - right, k) / C(drawn, k),
    unbiased (Chen et al. 2021, arXiv:2107.03374, equation 1). Not a number where fewer than k were drawn."""
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k) if drawn >= k else math.nan


def shown(group: Group, rewards: list[float]) -> tuple[str, str]:
    """A prompt, and its different answers with their rewards, the best first: what a reader looks at."""
    answers = {answer.text: reward for answer, reward in zip(group.answers, rewards, strict=True)}
    best_first = sorted(answers.items(), key=lambda each: -each[1])
    said = [f"\n  {reward:6.3f}  {text}" for text, reward in best_first]
    return group.row["conversations"][-1]["content"], "".join(said)


# From a config -------------------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    train: Rollouts
    val: Rollouts | None


def plain_rollouts(data: Data, engine: Engine, start: Start[DistillConfig]) -> Sources:
    """Answers that nobody judges: a teacher has its word on each of their tokens."""
    how = sampling_of(start.config)
    train = Rollouts(data.train, engine, start.tokenizer, how)
    if data.val is None:
        return Sources(train, None)
    return Sources(train, Rollouts(data.val, engine, start.tokenizer, held_out(how)))


def judged_rollouts(data: Data, engine: Engine, start: Start[Any]) -> Sources:
    """Raises ValueError for a reward or a tool that is not known."""
    config: GRPOConfig = start.config
    judging = judging_of(config, engine)
    judging = replace(judging, scale_rewards=config.scale_rewards, filter_groups=config.filter_groups)
    return rollouts_of(data, engine, start, judging, Judged)


def rollouts_of(
    data: Data, engine: Engine, start: Start[Any], judging: Judging, kind: Callable[..., Judged]
) -> Sources:
    """Rollouts on both parts of the data. Held-out answers are drawn by the same numbers at every validation, and have
    their reward alone, without a penalty. kind: what is called as Judged is."""
    config: RolloutConfig = start.config
    box, as_it_began = Toolbox(build_tools(config.tools), config.max_turns), starting_network(start, engine)

    def made(loader: Loader, how: Sampling, judging: Judging, passes: int) -> Judged:
        return kind(loader, engine, start.tokenizer, how, judging, as_it_began, passes, box)

    how = sampling_of(config)
    train = made(data.train, how, judging, config.inner_epochs)
    if data.val is None:
        return Sources(train, None)
    alone, larger = Judging(judging.reward, judging.pass_reward), how._replace(group_size=config.eval_group_size)
    return Sources(train, made(data.val, held_out(larger), alone, 1))


def sampling_of(config: RolloutConfig | DistillConfig) -> Sampling:
    return Sampling(config.group_size, config.max_new_tokens, config.temperature, config.seed)


def held_out(how: Sampling) -> Sampling:
    """Not by the numbers of training, by which what was right then is drawn again more often than by others."""
    return how._replace(seed=how.seed + HELD_OUT)


def judging_of(config: RolloutConfig, engine: Engine) -> Judging:
    """Raises ValueError for a reward that is not known."""
    reward = Reward(config.reward, config.reward_weights or None, judges(engine.device))
    whole = sum(weight for weight in reward.weights if weight > 0)
    passing = whole if config.pass_reward is None else config.pass_reward
    return Judging(reward, passing, overlong_buffer=config.overlong_buffer)


def starting_network(start: Start[Any], engine: Engine) -> AsItBegan:
    """Where an adapter is new, the network with it switched off; else a frozen copy, whole on every rank."""
    if newly_adapted(start.model, start.config.init_from):
        return lambda network: switched_off(network)
    weights = start.found or start.weights
    frozen = assemble(start.model.config, weights(), engine.device, adapter=start.model.adapter).requires_grad_(False)
    return lambda network: nullcontext(frozen)
