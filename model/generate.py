"""Prompts in, tokens out, one step at a time: batched sampling with a key-value cache.

    generate(model, [[1, 71, 905], [1, 88]], max_new_tokens=2, temperature=0)
    -> [Generation(ids=[12, 9], finish_reason="length"), Generation(ids=[40], finish_reason="stop")]

Prompts of any lengths stand in one batch, and rows that have finished leave it; neither changes any answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import check_writes
from model.decode import CachedGPT
from model.gpt import GPT

COLD = 1e-6  # a temperature below is as good as 0, and logits over it could be infinite
FEW = 128  # tokens looked at first for top_p
LEAVE = 0.75  # finished rows leave when so few of the batch are left: leaving costs a copy of the others' cache


@dataclass
class Generation:
    """What one prompt was answered with; the stop token itself is not in `ids`."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"  # "stop": a stop token came; "length": max_new_tokens or the context was used up


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    seed: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield one list a step with each prompt's next token, stop tokens included; None once a prompt has finished.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. Ids from `vocab_size` (the tokenizer's) on are never drawn: a
    model may have more rows than its tokenizer has tokens (None: all may be). A row ends at a stop token, after
    max_new_tokens, or when the context (config.max_seq_len) is full. Raises ValueError for an empty prompt, one that
    fills the context, or a sampling setting out of range.
    """
    check_arguments(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    room = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    longest = max(len(prompt) + more for prompt, more in zip(prompts, room, strict=True))
    network = CachedGPT(model, len(prompts), longest)
    # what a row of the batch needs; rows leave it when they have finished
    rows = list(range(len(prompts)))  # which prompt each answers
    draws = uniforms(len(prompts), max(room), seed).to(network.device)
    seen = seen_tokens(prompts, model.config.vocab_size).to(network.device)
    logits = network.add(prompts)
    for step in range(max(room)):
        with torch.inference_mode():
            scores = penalise_repetition(logits.float(), seen, repetition_penalty)[:, :vocab_size]
            ids = sample(scores, temperature, top_k, top_p, draws[:, step : step + 1])
            seen.scatter_(1, ids, True)
        answered: list[int | None] = [None] * len(prompts)
        going_on = []
        for place, (row, token) in enumerate(zip(rows, ids[:, 0].tolist(), strict=True)):
            if room[row]:
                answered[row] = token
                room[row] = 0 if token in stop_ids else room[row] - 1
            if room[row]:
                going_on.append(place)
        yield answered
        if not going_on:
            return
        if len(going_on) <= len(rows) * LEAVE:
            network.keep(going_on)
            rows = [rows[place] for place in going_on]
            ids, draws, seen = ids[going_on], draws[going_on], seen[going_on]
        logits = network.step(ids[:, 0])


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int] = (), **settings
) -> list[Generation]:
    """Run `stream` to its end (same settings) and gather each prompt's answer."""
    answers = [Generation() for _ in prompts]
    for tokens in stream(model, prompts, stop_ids=stop_ids, **settings):
        for answer, token in zip(answers, tokens, strict=True):
            if token is None:
                continue
            if token in stop_ids:
                answer.finish_reason = "stop"
            else:
                answer.ids.append(token)
    return answers


def check_arguments(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> None:
    check_writes(model.config)
    if not prompts:
        raise ValueError("no prompt was given")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; it must have at least 1 and leave room in the model's context "
                f"of {model.config.max_seq_len}: shorten it"
            )
    in_range = {
        "max_new_tokens": (max_new_tokens >= 1, "at least 1", max_new_tokens),
        "temperature": (temperature >= 0, "0 (greedy) or more", temperature),
        "top_k": (top_k >= 0, "0 (off) or more", top_k),
        "top_p": (0 < top_p <= 1, "in (0, 1]", top_p),
        "repetition_penalty": (repetition_penalty > 0, "more than 0 (1 is off)", repetition_penalty),
    }
    for name, (good, expected, value) in in_range.items():
        if not good:
            raise ValueError(f"{name} is {value}; it must be {expected}")


def uniforms(rows: int, steps: int, seed: int | None) -> Tensor:
    """Numbers in [0, 1) to draw by, (rows, steps). A row's depend on the seed and its place in the batch alone, so that
    an answer is the same whatever the other prompts are, and on whatever device."""
    if seed is None:
        return torch.rand(rows, steps)
    seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(each)) for each in seeds])


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Whether each token is in each prompt: bool (prompts, vocabulary)."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens seen before less likely (Keskar et al. 2019, arXiv:1909.05858): (batch, vocabulary) both."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """One token a row: (batch, vocabulary), (batch, 1) in [0, 1) -> (batch, 1). top_p is nucleus sampling
    (arXiv:1904.09751). The token is where the running sum of probabilities passes `uniform` (inverse transform
    sampling), so a draw costs one random number."""
    if temperature < COLD:
        return logits.argmax(-1, keepdim=True)
    candidates = None
    if 0 < top_k < logits.shape[-1]:
        logits, candidates = logits.topk(top_k)  # the likeliest first
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1 and candidates is None:
        probabilities, candidates = likeliest(probabilities, top_p)
    if top_p < 1:
        # dropped: tokens whose more likely neighbours already hold top_p; the first is always kept
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        probabilities = probabilities.masked_fill(dropped, 0)
    drawn = where_passed(probabilities, uniform)
    return drawn if candidates is None else candidates.gather(1, drawn)


def where_passed(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of probabilities, which need not sum to 1, passes `uniform` of it: (batch, tokens),
    (batch, 1) -> (batch, 1)."""
    running = probabilities.cumsum(-1)
    # a millionth below the sum, which rounding could reach otherwise: an impossible token would be drawn
    target = uniform * running[:, -1:] * (1 - 1e-6)
    return torch.searchsorted(running, target, right=True)


def likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens first, (rows, n) probabilities and ids: enough of them to hold `mass` in every row."""
    if probabilities.device.type == "cpu":
        # a few are found ten times faster than all are sorted, and of a trained model a few are enough
        found, ids = probabilities.topk(min(FEW, probabilities.shape[-1]))
        if bool((found.sum(-1) >= mass).all()):
            return found, ids
    return probabilities.sort(descending=True)
