"""How good a model is on a file: rows in, one dict of numbers out. The rows' own form decides what is measured.

    {"text": ...}           -> {"form": "pretrain", "rows": 50, "loss": 3.21, "bits_per_byte": 1.35, ...}
    {"conversations": ...}  -> {"form": "full_sft", "rows": 50, "loss": 2.10, "exact_match": 0.12, ...}
    {"chosen", "rejected"}  -> {"form": "dpo", "rows": 50, "accuracy": 0.61, "margin": 4.7, ...}

Rows are encoded by the code that encodes them for training, so the same ones are dropped and cut; both are counted.
"""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dataset import DataError, TextTokenizer, render_chat
from dataset.batch import IGNORE
from dataset.encode import Encoder, Rules
from dataset.forms import CONVERSATION, TEXT
from dataset.loader import Report, supervise
from dataset.records import Row, form_of
from model import GPT, generate

Result = dict[str, Any]  # `score_file` says what stands in it: names and counts besides the numbers
Encoded = list[tuple[Row, Any]]  # rows with their columns, which their form says (dataset/forms.py)


class Labelled(NamedTuple):
    """What the model reads in one row of a batch. Both are int64 (tokens,)."""

    input_ids: Tensor
    labels: Tensor  # labels[i] is the token after input_ids[i], IGNORE where none counts


def score_file(
    model: GPT,
    tokenizer: TextTokenizer,
    path: str | Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    max_rows: int = 0,
    reference: GPT | None = None,
) -> Result:
    """Score a JSONL file's rows, or its first `max_rows` (0: all), with a model in eval mode.

    Every result has file, form, rows (scored), `dropped` and `cut` (what happened to how many rows; as in training).

    pretrain: loss (nats a token) and perplexity over `<s> text </s>`, bits_per_byte = nats / ln 2 / UTF-8 bytes of the
        texts. A document longer than the context is scored in windows of max_seq_len, each starting without context;
        every token but `<s>` is predicted once. windowed_rows counts such documents.
    full_sft: loss and perplexity over the supervised tokens, which `tokens` counts. exact_match: share of
        generated_rows whose greedy answer is the final assistant turn (reasoning and tool calls included; outer white
        space is not compared). Rows whose final turn is longer than max_new_tokens, or does not fit the context,
        cannot match: they are not generated, and counted as too_long_to_generate. stopped: share of the answers that
        ended by themselves.
    dpo: accuracy, the share of pairs whose chosen answer has the larger summed log-probability, and the mean margin
        between the two in nats. With `reference` also reward_accuracy and reward_margin, of DPO's implicit reward
        log p(answer) - log ref(answer) (Rafailov et al. 2023, arXiv:2305.18290, without beta).

    Raises DataError for a bad row, and ValueError where no row is left.
    """
    path, form = str(path), form_of(path)
    encoder = Encoder([path], tokenizer, Rules(form, model.config.max_seq_len), Report())
    rows = islice(encoder.rows(), max_rows or None)
    encoded = [(row, tokens.columns) for row, tokens in encoder.encode(rows)]
    dropped, cut = dict(encoder.report.dropped), dict(encoder.report.cut)
    if not encoded:
        raise ValueError(f"{path}: no row is left to score; dropped: {dropped or 'none'}")
    result = {"file": path, "form": form.stage, "rows": len(encoded), "dropped": dropped, "cut": cut}
    if form is TEXT:
        return result | score_text(model, encoded, batch_size)
    if form is CONVERSATION:
        result |= score_answers(model, encoded, batch_size)
        return result | exact_matches(model, tokenizer, [row for row, _ in encoded], batch_size, max_new_tokens)
    return result | score_pairs(model, encoded, batch_size, reference)


# Losses ---------------------------------------------------------------------------------------------------------


def labelled(ids: Sequence[int], spans: Sequence[int]) -> Labelled:
    """Encoded tokens and the spans (start, end, start, end ...) of those to predict.

    labelled([1, 40, 41, 2], [2, 4]) -> Labelled([1, 40, 41], [-100, 41, 2])
    """
    tokens = torch.as_tensor(ids, dtype=torch.long)
    return Labelled(tokens[:-1], supervise(tokens, np.asarray(spans)))


def windows(ids: Sequence[int], size: int) -> list[Labelled]:
    """A document in windows of at most `size` tokens; every token but the first is predicted in exactly one of them."""
    whole = labelled(ids, [1, len(ids)])
    return [Labelled(*pair) for pair in zip(whole.input_ids.split(size), whole.labels.split(size), strict=True)]


@torch.inference_mode()
def summed_nll(model: GPT, sequences: Sequence[Labelled], batch_size: int) -> Tensor:
    """-log p of all labels of each sequence, nats: float64 (sequences,).

    Long ones go first: where memory does not suffice, it runs out at once and not at the end.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].labels))
    for start in tqdm(range(0, len(order), batch_size), desc="scoring", leave=False, disable=None):
        numbers = order[start : start + batch_size]
        # padding stands at the right, where no token can see it
        input_ids, labels = (
            pad_sequence([sequences[i][field] for i in numbers], batch_first=True, padding_value=padding).to(device)
            for field, padding in ((0, 0), (1, IGNORE))
        )
        sums[numbers] = model(input_ids, labels=labels).double().sum(-1).cpu()
    return sums


def score_text(model: GPT, encoded: Encoded, batch_size: int) -> dict[str, float]:
    """Loss of documents, in windows of the context."""
    sequences = [windows(columns["ids"], model.config.max_seq_len) for _, columns in encoded]
    flat = [window for document in sequences for window in document]
    nats, tokens = float(summed_nll(model, flat, batch_size).sum()), sum(len(window.labels) for window in flat)
    size = sum(len(row.value["text"].encode()) for row, _ in encoded)
    return mean_loss(nats, tokens) | {
        "bits_per_byte": nats / math.log(2) / size,
        "bytes": size,
        "windowed_rows": sum(len(document) > 1 for document in sequences),
    }


def mean_loss(nats: float, tokens: int) -> dict[str, float]:
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}  # exp(710) is no float any more


def score_answers(model: GPT, encoded: Encoded, batch_size: int) -> dict[str, float]:
    """Loss of the supervised tokens."""
    sequences = [labelled(columns["ids"], columns["spans"]) for _, columns in encoded]
    nats = float(summed_nll(model, sequences, batch_size).sum())
    return mean_loss(nats, sum(int((p.labels != IGNORE).sum()) for p in sequences))


def score_pairs(model: GPT, encoded: Encoded, batch_size: int, reference: GPT | None) -> dict[str, float]:
    """Which answer of each pair the model thinks more likely."""
    sequences = [
        labelled(columns[side], [columns["prompt"], len(columns[side])])
        for _, columns in encoded
        for side in ("chosen", "rejected")
    ]
    logps = -summed_nll(model, sequences, batch_size).view(-1, 2)
    result = preference(logps, "")
    if reference is not None:
        result |= preference(logps + summed_nll(reference, sequences, batch_size).view(-1, 2), "reward_")
    return result


def preference(values: Tensor, name: str) -> dict[str, float]:
    """Values of chosen and rejected, (pairs, 2) -> share of pairs whose chosen is larger, and mean distance."""
    margin = values[:, 0] - values[:, 1]
    return {f"{name}accuracy": float((margin > 0).double().mean()), f"{name}margin": float(margin.mean())}


# Answers --------------------------------------------------------------------------------------------------------


def exact_matches(
    model: GPT, tokenizer: TextTokenizer, rows: Sequence[Row], batch_size: int, max_new_tokens: int
) -> dict[str, float | None]:
    """Greedy answers against the final assistant turns."""
    tasks = []
    for row in rows:
        prompt, answer = final_turn(tokenizer, row)
        room = min(max_new_tokens, model.config.max_seq_len - len(prompt))
        if len(answer) <= room:
            tasks.append((prompt, answer))
    tasks.sort(key=lambda task: -len(task[0]))
    matched = stopped = 0
    for start in tqdm(range(0, len(tasks), batch_size), desc="answering", leave=False, disable=None):
        prompts, answers = zip(*tasks[start : start + batch_size], strict=True)
        generations = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=0,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
        )
        for generation, answer in zip(generations, answers, strict=True):
            ended = generation.finish_reason == "stop"
            stopped += ended
            matched += ended and text_of(tokenizer, generation.ids) == text_of(tokenizer, answer)
    share = {name: n / len(tasks) if tasks else None for name, n in (("exact_match", matched), ("stopped", stopped))}
    return share | {"generated_rows": len(tasks), "too_long_to_generate": len(rows) - len(tasks)}


def final_turn(tokenizer: TextTokenizer, row: Row) -> tuple[list[int], list[int]]:
    """Ids of the conversation up to the last assistant turn, header included; ids of that turn, its end included."""
    messages = row.value["conversations"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = render_chat(tokenizer, messages[:last], add_generation_prompt=True).ids
    rendered = render_chat(tokenizer, messages[: last + 1])
    if rendered.ids[: len(prompt)] != prompt:
        raise DataError(f"{row.where}: the answer changes how its prompt is rendered by this tokenizer's chat template")
    end = max(i + 1 for i, supervised in enumerate(rendered.mask) if supervised)
    return prompt, rendered.ids[len(prompt) : end]


def text_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """A turn's text without its end token; reasoning and tool calls stand in it with their control tokens' names."""
    return tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids], skip_control=False).strip()
