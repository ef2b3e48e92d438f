"""Are answers whole? What a model says to open prompts, and what a reader would see at a glance, as numbers.

    answers = answer(model, tokenizer, prompts, max_new_tokens=96)        [Answer(text="The red horse lives ...", ...)]
    health(answers)    {"ended": 1.0, "no_loops": 0.98, "distinct_2": 0.41, "answer_tokens": 31.2}

A preference score can rise while answers fall apart, so these stand beside it wherever one is measured.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from dataset import Message, TextTokenizer, render_chat
from evaluation.wording import loops
from model import GPT, generate


class Answer(NamedTuple):
    """What one prompt was answered with."""

    text: str
    ids: list[int]
    ended: bool  # by itself, and not by the length


def answer(
    model: GPT,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = 0,
    batch_size: int = 32,
) -> list[Answer]:
    """An answer to each conversation, in order. A prompt that leaves no room in the context raises ValueError."""
    ids = [render_chat(tokenizer, messages, add_generation_prompt=True).ids for messages in prompts]
    return answer_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
    )


def answer_ids(
    model: GPT,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = 0,
    batch_size: int = 32,
) -> list[Answer]:
    """`answer` for prompts that are rendered already."""
    answers = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="answering", leave=False, disable=None):
        generations = generate(
            model,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=None if seed is None else seed + start,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
        )
        answers += [Answer(tokenizer.decode(g.ids), g.ids, g.finish_reason == "stop") for g in generations]
    return answers


def health(answers: Sequence[Answer]) -> dict[str, float]:
    """ended: share that end by themselves; no_loops: share without a block of tokens that comes again and again;
    distinct_2: different pairs of neighbouring tokens over all pairs (Li et al. 2016, arXiv:1510.03055);
    answer_tokens: mean length. Raises ValueError for no answers."""
    if not answers:
        raise ValueError("no answers to look at")
    pairs = [pair for each in answers for pair in zip(each.ids, each.ids[1:], strict=False)]
    return {
        "ended": sum(each.ended for each in answers) / len(answers),
        "no_loops": sum(not loops(each.ids) for each in answers) / len(answers),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "answer_tokens": sum(len(each.ids) for each in answers) / len(answers),
    }
