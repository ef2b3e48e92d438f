"""What is optimised: a model and a batch in, a SUM and its weight out. Means are taken once, over the whole update.

    NextToken   sum of -log p(next token), weight = supervised tokens
    DPO         sum over pairs of -log sigmoid(beta * margin), weight = pairs

An objective returns (loss to differentiate, {name: summed statistic}); `metrics` turns the sums over all micro-batches
and ranks into what is logged.
"""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.batch import Batch, PairBatch


class Objective(Protocol):
    names: tuple[str, ...]  # of the summed statistics, "loss" first

    def weight(self, batch: Any) -> int: ...
    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]: ...
    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]: ...


class NextToken:
    """Cross-entropy of the next token (pretraining and SFT).

    token_bytes: int (vocabulary,), UTF-8 bytes of every token; with it `bpb` (bits per byte) is reported as well.
    """

    def __init__(self, token_bytes: Tensor | None = None):
        self.token_bytes = token_bytes
        self.names: tuple[str, ...] = ("loss",) if token_bytes is None else ("loss", "bytes")

    def weight(self, batch: Batch) -> int:
        return batch.supervised

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(batch.input_ids, batch.position_ids, batch.labels).sum()
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


def sequence_logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Summed log-probability of every answer, nats: (pairs, 2), chosen first. A sum, not a mean over its length."""
    nll = model(batch.input_ids, batch.position_ids, batch.labels)
    sums = nll.new_zeros(2 * batch.n_pairs + 1)
    # places outside the answers carry segment -1 and land in a last entry that is dropped
    segment = torch.where(batch.segment < 0, 2 * batch.n_pairs, batch.segment)
    return -sums.index_add(0, segment.flatten(), nll.flatten())[:-1].view(batch.n_pairs, 2)


class DPO:
    """Direct preference optimization, sigmoid loss (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    loss = -log sigmoid(beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))))
    """

    names: tuple[str, ...] = (
        "loss",
        "reward_accuracy",
        "chosen_reward",
        "rejected_reward",
        "chosen_logp",
        "rejected_logp",
    )

    def __init__(self, beta: float = 0.1):
        self.beta = beta

    def weight(self, batch: PairBatch) -> int:
        return batch.n_pairs

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logps = sequence_logps(model, batch)
        rewards = self.beta * (logps - batch.reference)
        margin = rewards[:, 0] - rewards[:, 1]
        loss = -F.logsigmoid(margin).sum()
        kept = rewards.detach()
        sums = {
            "loss": loss.detach(),
            "reward_accuracy": (margin.detach() > 0).sum(),
            "chosen_reward": kept[:, 0].sum(),
            "rejected_reward": kept[:, 1].sum(),
            "chosen_logp": logps.detach()[:, 0].sum(),
            "rejected_logp": logps.detach()[:, 1].sum(),
        }
        return loss, sums

    def metrics(self, sums: dict[str, float], weight: float) -> dict[str, float]:
        """Means over pairs. `drift` is the mean change of the chosen answers' log-probability since the start, nats."""
        metrics = {name: value / max(1.0, weight) for name, value in sums.items()}
        metrics["reward_margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
        metrics["drift"] = metrics["chosen_reward"] / self.beta
        return metrics
