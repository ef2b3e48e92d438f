"""Prompts in, tokens out, one step at a time: batched sampling with a key-value cache.

    generate(model, [[1, 71, 905], [1, 88]], max_new_tokens=2, temperature=0)
    -> [Generation(ids=[12, 9], finish_reason="length"), Generation(ids=[40], finish_reason="stop")]

Prompts of different lengths are padded on the left. A pad has position 0, which makes it a document of its own that
the prompt never looks at, so no attention mask has to be passed around.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.gpt import GPT, KVCache


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
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    room = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    ids, positions = left_pad(prompts, device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    cache = KVCache(model.config, len(prompts), ids.shape[1] + max(room), device, next(model.parameters()).dtype)
    finished = [False] * len(prompts)
    for step in range(max(room)):
        with torch.inference_mode():
            logits = model(ids, positions, cache=cache)[:, -1].float()
            logits = penalise_repetition(logits, seen, repetition_penalty)
            if vocab_size is not None:
                logits[:, vocab_size:] = -torch.inf
            ids = sample(logits, temperature, top_k, top_p, generator)
            seen.scatter_(1, ids, True)
            positions = positions[:, -1:] + 1
        tokens = ids[:, 0].tolist()
        yield [None if done else token for done, token in zip(finished, tokens, strict=True)]
        finished = [
            done or token in stop_ids or step + 1 >= limit
            for done, token, limit in zip(finished, tokens, room, strict=True)
        ]
        if all(finished):
            return


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


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and positions, each (prompts, longest); pads are id 0 at position 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        positions[row, longest - len(prompt) :] = torch.arange(len(prompt))
    return ids.to(device), positions.to(device)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens seen before less likely (Keskar et al. 2019, arXiv:1909.05858): (batch, vocabulary) both."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row: (batch, vocabulary) -> (batch, 1). top_p is nucleus sampling (arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # dropped: tokens whose more likely neighbours already hold top_p; the first is always kept
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
