"""Prompts with the answers to them: what a rollout is made of.

Group(number=12, key=305, prompt=[1, 71, 905], row={"conversations": ...}, where="prompts.jsonl:13", answers=[
    Answer(ids=[12, 2], drawn=[True, True], logps=[-0.3, -1.2], entropy=1.9, finish_reason="stop", text="4")])
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import Message, TextTokenizer
from dataset.forms import Value
from evaluation import Sample
from model.draw import Drawn


class Sampling(NamedTuple):
    """How answers are drawn."""

    group_size: int
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class Answer:
    """What was said after a prompt. Where tools are called, that is several turns, of which some were not drawn."""

    ids: list[int] = field(default_factory=list)  # after the prompt's
    drawn: list[bool] = field(default_factory=list)  # which of them the model drew; the others it only read
    logps: list[float] = field(default_factory=list)  # of those that it drew, nats
    entropy: float = 0.0  # of the distributions they were drawn from, nats, summed
    finish_reason: str = "length"  # of the last turn, "stop" or "length"
    text: str = ""  # of the last turn, with the names of its control tokens
    turns: list[Message] = field(default_factory=list)  # before the last one


@dataclass
class Group:
    """A prompt and its answers."""

    number: int  # of the row
    key: int  # what its answers are drawn by: its place among all prompts since the start of training
    prompt: list[int]
    row: Value  # as its form writes it
    where: str  # path:line
    answers: list[Answer]

    @property
    def messages(self) -> list[Message]:
        found: list[Message] = self.row["conversations"]
        return found

    def samples(self) -> list[Sample]:
        return [
            Sample([*self.messages, *answer.turns], answer.text, self.row, answer.finish_reason, self.where)
            for answer in self.answers
        ]


def uniform(how: Sampling, *key: int) -> Tensor:
    """Numbers in [0, 1) to draw an answer by, float32 (max_new_tokens,)."""
    return torch.from_numpy(np.random.default_rng([how.seed, *key]).random(how.max_new_tokens, dtype=np.float32))


def add_turn(answer: Answer, turn: Drawn, tokenizer: TextTokenizer) -> Answer:
    """The answer with one more turn of the model's."""
    answer.ids += turn.ids
    answer.drawn += [True] * len(turn.ids)
    answer.logps += turn.logps
    answer.entropy += turn.entropy
    answer.finish_reason = turn.finish_reason
    said = turn.ids[:-1] if turn.finish_reason == "stop" else turn.ids
    answer.text = tokenizer.decode(said, skip_control=False).strip()
    return answer
