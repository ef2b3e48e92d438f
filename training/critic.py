"""What a critic is told and asked: rewards and values in, what each drawn token was worth beyond what was expected out.

    an answer of 4 tokens     reward 1 behind the last
    values                    .2   .5   .4   .8      V(what was said before each token)
    gamma 1, gae_lambda 1     .8   .5   .6   .2      reward - value
    gamma 1, gae_lambda 0     .3  -.1   .4   .2      value of the next place (the reward, at the end) - value

A critic is a network with a head of one row, asked at the places whose labels are the drawn tokens. It is learnt beside
the policy from what came of the same answers (engines/actor_critic.py).
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equations 11 and 16), of answers whose
    reward comes behind their last token, after which nothing does.

    A(t) = sum over l of (gamma lam)^l d(t + l),   d(t) = r(t) + gamma V(t + 1) - V(t)

    Args:
        rewards: (answers,).
        values: (tokens,), of all answers end to end.
        lengths: int64 (answers,), tokens of each, at least 1.

    Returns:
        Advantages and returns A + V, what the critic is to say, both float64 (tokens,).
    """
    there = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]
    table = torch.zeros(there.shape, dtype=torch.float64)
    table[there] = values.double()
    paid = torch.zeros_like(table)
    paid[torch.arange(len(lengths)), lengths - 1] = rewards.double()
    advantages, later = torch.zeros_like(table), torch.zeros(len(lengths), dtype=torch.float64)
    following = torch.zeros_like(later)  # value of the next place
    for t in reversed(range(there.shape[1])):
        later = (paid[:, t] + gamma * following - table[:, t] + gamma * lam * later) * there[:, t]
        advantages[:, t], following = later, table[:, t]
    found = advantages[there]
    return found, found + values.double()


def clipped_value_loss(values: Tensor, before: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (V' - R)^2), V' = V held within `clip` of what it was when the answers were drawn, (tokens,).

    A value gains nothing by going further with one set of answers. It stands in the code of PPO (Schulman et al. 2017,
    arXiv:1707.06347), and is written out by Huang et al. 2022, "The 37 implementation details of PPO", 9. A clip of 0
    is none."""
    error = (values - returns) ** 2
    if clip:
        error = error.maximum((before + (values - before).clamp(-clip, clip) - returns) ** 2)
    return error / 2
