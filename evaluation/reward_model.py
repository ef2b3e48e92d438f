"""A reward model asked: conversations in, a score each out; and the `Judge` that rewards are made of.

    scorer = RewardModel.load("out/reward_128")
    scorer([Sample([{"role": "user", "content": "6 x 7?"}], "42", {})])      [1.73]
    Reward(["reward_model:out/reward_128"], judges=judges())               the same as a reward

A score stands on the last token of the answer, rendered with its end as in training (dataset.forms.ScoredForm); one
that was cut is scored as if it had ended there. What else is in a batch does not change a score but by rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataset import SCORED, TextTokenizer, load_tokenizer, parse_answer
from evaluation.rewards import Judge, Sample
from model import GPT, load_pretrained


class RewardModel:
    """A `Judge`. The model is asked without gradients, in the precision of its weights."""

    def __init__(self, model: GPT, tokenizer: TextTokenizer, batch_size: int = 32):
        """Raises ValueError for a model that writes."""
        if not model.config.scores:
            raise ValueError("found a model that writes, expected a reward model: a folder that train_reward.py left")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "RewardModel":
        """Raises as `load_pretrained` does, and ValueError for a folder whose model writes."""
        try:
            return cls(load_pretrained(folder, device), load_tokenizer(folder))
        except ValueError as error:
            raise ValueError(f"reward_model:{folder}: {error}") from None

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return self.score([self.ids(sample) for sample in samples]).tolist()

    def ids(self, sample: Sample) -> list[int]:
        """What is read of a sample, cut at the model's context."""
        rendered = SCORED.side([*sample.messages, parse_answer(sample.answer)], self.tokenizer)
        return rendered[: self.model.config.max_seq_len]

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The score at the last of each one's tokens: float64 (sequences,). Those of one length go together."""
        device = next(self.model.parameters()).device
        scores = torch.zeros(len(sequences), dtype=torch.float64)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            # padding stands at the right, where no token can see it
            ids = pad_sequence([torch.tensor(sequences[i]) for i in numbers], batch_first=True).to(device)
            last = torch.tensor([len(sequences[i]) - 1 for i in numbers], device=device)
            found = self.model(ids)[..., 0].gather(1, last[:, None])[:, 0]
            scores[numbers] = found.float().cpu().double()  # Apple's GPUs have no float64
        return scores


def judges(device: str | torch.device = "cpu") -> Mapping[str, Callable[[str], Judge]]:
    """What `Reward` is given so that it knows `reward_model:FOLDER`."""
    return {"reward_model": lambda folder: RewardModel.load(folder, device)}
