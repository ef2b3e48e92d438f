"""Rollouts whose tokens are judged one by one, with a critic's help: the source of PPO, and the critic it starts with.

    critic = starting_critic(start)                              a GPT that scores, its weights, their hash
    engine = actor_critic(start, critic, machine)                an Engine of both
    rollouts = valued_rollouts(data, engine, start, objective)   batches with values, returns, and advantages by GAE

Advantages are whitened over the whole update, on all ranks: mean 0 and standard deviation 1.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataset.batch import Batch, ValuedBatch
from model import GPT
from model.folder import folder_weights
from model.folder import load_config as load_model_config
from model.gpt import fresh_weights, with_score
from training.config import model_folder
from training.critic import gae
from training.engines import Machine, Weights, build_engine
from training.engines.actor_critic import ActorCritic
from training.groups import Group
from training.objectives import PPO
from training.optimizer import peak_rate
from training.rollout import Judged, Sources, judging_of, rollouts_of
from training.setup import Data, Start, weights_hash
from training.stages import PPOConfig


class Valued(Judged):
    """Judged answers, each of whose tokens has an advantage of its own."""

    engine: ActorCritic

    def __init__(self, objective: PPO, *judged: Any):
        """judged: what Judged is made of."""
        super().__init__(*judged)
        self.objective = objective

    def batch(self, groups: list[Group], network: GPT) -> ValuedBatch:
        """Every rank takes part: the critic may be spread over them."""
        rewards, tallies = self.judge(groups)
        drawn = self.lay(groups, torch.zeros_like(rewards), tallies, network)
        said = self.engine.critic.per_place(drawn, self.objective.critic).score
        assert said is not None
        values = said.flatten().cpu()[drawn.learnt]
        config = self.objective
        advantages, returns = gae(rewards.flatten(), values, drawn.lengths, config.gamma, config.gae_lambda)
        return ValuedBatch(**vars(drawn) | {"advantages": advantages.float()}, values=values, returns=returns.float())

    def update(self, position: int) -> list[Batch]:
        batches = super().update(position)
        valued = [batch for batch in batches if isinstance(batch, ValuedBatch)]
        found = torch.cat([batch.advantages for batch in valued]).double()
        n, total, squares = self.engine.sum_over_ranks([len(found), float(found.sum()), float((found**2).sum())])
        mean = total / max(1.0, n)
        spread = math.sqrt(max(0.0, squares / max(1.0, n) - mean**2))
        for batch in valued:
            batch.advantages = ((batch.advantages.double() - mean) / (spread + 1e-8)).float()
        return batches


def valued_rollouts(data: Data, engine: ActorCritic, start: Start[Any], objective: PPO) -> Sources:
    """As rollout.judged_rollouts."""
    return rollouts_of(data, engine, start, judging_of(start.config, engine), partial(Valued, objective))


# The critic ----------------------------------------------------------------------------------------------------------


@dataclass
class StartingCritic:
    """What a run's critic is at first."""

    model: GPT  # on the meta device
    weights: Weights
    identity: str


def starting_critic(start: Start[PPOConfig]) -> StartingCritic:
    """That of --critic, a reward model; else the policy's network with a new head. It is learnt whole.

    Raises ValueError for a folder whose model writes, and FileNotFoundError for one that is not there.
    """
    config, init = start.config, start.config.init_from or "none"
    if config.critic is not None:
        folder: str | Path = model_folder(config.critic, config.out_dir)
        shape = load_model_config(folder)
        if not shape.scores:
            raise ValueError(f"--critic {config.critic}: found a model that writes, expected a reward model's folder")
        if shape.vocab_size != start.model.config.vocab_size:
            raise ValueError(
                f"--critic {config.critic} has {shape.vocab_size:,} rows of its embedding and the policy "
                f"{start.model.config.vocab_size:,}; give one of the same tokenizer"
            )
        weights: Weights = partial(folder_weights, folder)
    else:
        shape = replace(start.model.config, scores=True)
        body = partial(fresh_weights, start.model.config, config.seed)
        if init != "none":
            body = partial(folder_weights, init)

        def weights() -> Any:
            return with_score(body(), shape, config.seed)

    with torch.device("meta"):
        model = GPT(replace(shape, dropout=config.dropout))
    return StartingCritic(model, weights, weights_hash(weights))


def actor_critic(start: Start[PPOConfig], critic: StartingCritic, machine: Machine) -> ActorCritic:
    """Both spread alike."""
    config = start.config
    policy = build_engine(start.model, config, machine, start.weights)
    beside = build_engine(critic.model, replace(config, adapter=None), machine, critic.weights)
    rate = peak_rate(config)
    return ActorCritic(policy, beside, (config.critic_learning_rate or rate) / rate)
