"""Prompts in, several answers to each out, with the log-probability of every token drawn: what a rollout is made of.

    draw(model, [[1, 71, 905]], uniforms, copies=2, max_new_tokens=3, temperature=1.0, stop_ids=[2])
    -> [Drawn(ids=[12, 2], logps=[-0.3, -1.2], entropy=1.9, finish_reason="stop"), Drawn(ids=[12, 40, 9], ...)]

A prompt is read once for all its answers, and rows that have finished leave the batch. Who calls brings the random
numbers, so that an answer is the same whatever else is in the batch and wherever it is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.decode import CachedGPT
from model.generate import LEAVE, where_passed
from model.gpt import GPT


@dataclass
class Drawn:
    """One answer. What it ended with is among its tokens, since that was drawn as well."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # of each token, nats, under softmax(logits / temperature)
    entropy: float = 0.0  # of the distributions that the tokens were drawn from, nats, summed
    finish_reason: str = "length"  # "stop": a stop token came; "length": max_new_tokens or the context was used up


def draw(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    copies: int,
    max_new_tokens: int | Sequence[int],
    temperature: float,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
) -> list[Drawn]:
    """`copies` answers to each prompt, those to the first one first.

    uniforms: float32 (prompts * copies, max_new_tokens) in [0, 1), what the tokens of each answer are drawn by.
    max_new_tokens: of every answer, or of those to each prompt.
    Ids from `vocab_size` (the tokenizer's) on are never drawn. Every prompt leaves room for a token in the context.
    """
    context = model.config.max_seq_len
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    room = [min(n, context - len(prompt)) for prompt, n in zip(prompts, limits, strict=True) for _ in range(copies)]
    longest = max(len(prompt) for prompt in prompts)
    network = CachedGPT(model, len(prompts) * copies, min(longest + max(limits), context))
    answers, rows = [Drawn() for _ in room], list(range(len(room)))  # which answer each row of the batch is
    uniforms = uniforms.to(network.device)
    logits = network.add(prompts).repeat_interleave(copies, 0)
    network.repeat(copies)
    for step in range(max(room)):
        chosen = choose(logits, temperature, vocab_size, uniforms[:, step])
        for row, token, logp, entropy in zip(rows, *chosen.tolist(), strict=True):
            if room[row]:
                take(answers[row], int(token), logp, entropy, stop_ids)
                room[row] = 0 if answers[row].finish_reason == "stop" else room[row] - 1
        going_on = [place for place, row in enumerate(rows) if room[row]]
        if not going_on:
            break
        ids = chosen[0].long()
        if len(going_on) <= len(rows) * LEAVE:
            network.keep(going_on)
            rows, ids, uniforms = [rows[place] for place in going_on], ids[going_on], uniforms[going_on]
        logits = network.step(ids)
    return answers


def take(answer: Drawn, token: int, logp: float, entropy: float, stop_ids: Sequence[int]) -> None:
    answer.ids.append(token)
    answer.logps.append(logp)
    answer.entropy += entropy
    if token in stop_ids:
        answer.finish_reason = "stop"


@torch.inference_mode()
def choose(logits: Tensor, temperature: float, vocab_size: int | None, uniforms: Tensor) -> Tensor:
    """(rows, vocabulary), (rows,) -> float32 (3, rows): the tokens, their log-probabilities, and the entropies of the
    distributions, nats. Float32 holds every id of a vocabulary."""
    logps = (logits.float() / temperature).log_softmax(-1)
    probabilities = logps.exp()
    ids = where_passed(probabilities[:, :vocab_size], uniforms[:, None])
    entropies = -torch.linalg.vecdot(probabilities, logps)
    return torch.stack([ids[:, 0].float(), logps.gather(1, ids)[:, 0], entropies])
