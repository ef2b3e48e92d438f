"""How good a model is on a file: rows in, one dict of numbers out. The rows' own form decides what is measured.

    {"text": ...}           -> {"form": "pretrain", "rows": 50, "loss": 3.21, "bits_per_byte": 1.35, ...}
    {"conversations": ...}  -> {"form": "full_sft", "rows": 50, "loss": 2.10, "exact_match": 0.12, ...}
    {"chosen", "rejected"}  -> {"form": "dpo", "rows": 50, "accuracy": 0.61, "margin": 4.7, ...}
    the same, of a reward model -> {"form": "reward", "rows": 50, "accuracy": 0.94, "by_kind": {...}, ...}

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
from dataset.columns import Report
from dataset.encode import Rules, encode_row
from dataset.forms import CONVERSATION, PAIR, SCORED, TEXT, Form
from dataset.hub import local_path
from dataset.loader import supervise
from dataset.records import Row, form_of, read_rows
from evaluation.calibration import by_kind, draw, told_apart
from evaluation.health import answer_ids, health
from evaluation.reward_model import RewardModel
from model import GPT

OPEN_PROMPTS = 64  # of a file of pairs are answered
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
    plots: str | Path | None = None,
) -> Result:
    """Score a JSONL file's rows, or its first `max_rows` (0: all), with a model in eval mode.

    Every result has file, form, rows (scored), `dropped` and `cut` (what happened to how many rows; as in training).
    pretrain: loss (nats a token) and perplexity over `<s> text </s>`, bits_per_byte = nats / ln 2 / UTF-8 bytes of the
        texts. A document longer than the context is scored in windows of max_seq_len, each starting without context;
        every token but `<s>` is predicted once. windowed_rows counts such documents.
    full_sft: loss and perplexity over the supervised tokens, which `tokens` counts; and what `exact_matches` says.
    dpo: accuracy, the share of pairs whose chosen answer has the larger summed log-probability, and the mean margin
        between the two in nats. With `reference` also reward_accuracy and reward_margin, of DPO's implicit reward
        log p(answer) - log ref(answer) (Rafailov et al. 2023, arXiv:2305.18290, without beta), and length_ratio, the
        mean length of open answers over the reference's.
    reward (pairs, of a model that scores): what `score_rewards` says, and a picture of it in the folder `plots`.

    Answers to conversations and to (at most 64 different) prompts of pairs are looked at as `evaluation.health` does:
    ended (called stopped for conversations), no_loops, distinct_2, answer_tokens.

    Raises DataError for a bad row, and ValueError where no row is left.
    """
    path = local_path(str(path))
    form = form_for(model, path)
    rules, report = Rules(form, model.config.max_seq_len), Report()
    read = islice(read_rows([path], form), max_rows or None)
    both = ((row, encode_row(row, tokenizer, rules, report)) for row in read)
    encoded = [(row, tokens.columns) for row, tokens in both if tokens is not None]
    if not encoded:
        raise ValueError(f"{path}: no row is left to score; dropped: {dict(report.dropped) or 'none'}")
    counts = {"rows": len(encoded), "dropped": dict(report.dropped), "cut": dict(report.cut)}
    result = {"file": path, "form": form.stage} | counts
    if form is TEXT:
        return result | score_text(model, encoded, batch_size)
    if form is SCORED:
        return result | score_rewards(RewardModel(model, tokenizer, batch_size), encoded, path, plots)
    used = [row for row, _ in encoded]
    if form is CONVERSATION:
        result |= score_answers(model, encoded, batch_size)
        return result | exact_matches(model, tokenizer, used, batch_size, max_new_tokens)
    result |= score_pairs(model, encoded, batch_size, reference)
    return result | open_answers(model, tokenizer, used, batch_size, max_new_tokens, reference)


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
        sums[numbers] = model(input_ids, labels=labels).cpu().double().sum(-1)  # Apple's GPUs have no float64
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


# Scores ---------------------------------------------------------------------------------------------------------


def form_for(model: GPT, path: str | Path) -> Form:
    """How a file's rows are read for a model. Raises ValueError for rows that a reward model has nothing to say of."""
    form = form_of(path)
    if not model.config.scores:
        return form
    if form is not PAIR:
        raise ValueError(f"{path}: found rows for train_{form.stage}.py, expected pairs for a reward model to score")
    return SCORED


def score_rewards(scorer: RewardModel, encoded: Encoded, path: str, plots: str | Path | None) -> Result:
    """How well a reward model tells the answers of pairs apart, and how well it knows.

    accuracy: the share of pairs whose chosen answer has the larger score, with its 95 % interval; mean margin;
    calibration_error (calibration.py); by_kind: the same for rows of each "kind", where rows say one.
    """
    scores = scorer.score([columns[side] for _, columns in encoded for side in ("chosen", "rejected")]).view(-1, 2)
    margins, kinds = scores[:, 0] - scores[:, 1], [str(row.value.get("kind", "pairs")) for row, _ in encoded]
    result: Result = dict(told_apart(margins))
    if len(set(kinds)) > 1:
        result["by_kind"] = by_kind(margins, kinds)
    if plots is not None:
        result["plot"] = str(Path(plots) / f"calibration_{Path(path).stem}.png")
        draw(margins, kinds, Path(result["plot"]), f"{len(margins):,} pairs of {Path(path).name}")
    return result


# Answers --------------------------------------------------------------------------------------------------------


def exact_matches(
    model: GPT, tokenizer: TextTokenizer, rows: Sequence[Row], batch_size: int, max_new_tokens: int
) -> dict[str, float | None]:
    """Greedy answers against the final assistant turns.

    exact_match: share of generated_rows whose answer is that turn (reasoning and tool calls included; outer white space
    is not compared). Rows whose final turn is longer than max_new_tokens, or does not fit the context, cannot match:
    they are not generated, and counted as too_long_to_generate. stopped: share of the answers that ended by themselves.
    """
    tasks = []
    for row in rows:
        prompt, expected = final_turn(tokenizer, row)
        room = min(max_new_tokens, model.config.max_seq_len - len(prompt))
        if len(expected) <= room:
            tasks.append((prompt, expected))
    result: dict[str, float | None] = {"exact_match": None, "stopped": None}
    result |= {"generated_rows": len(tasks), "too_long_to_generate": len(rows) - len(tasks)}
    if not tasks:
        return result
    tasks.sort(key=lambda task: -len(task[0]))
    prompts = [prompt for prompt, _ in tasks]
    answers = answer_ids(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    matched = sum(
        found.ended and text_of(tokenizer, found.ids) == text_of(tokenizer, expected)
        for found, (_, expected) in zip(answers, tasks, strict=True)
    )
    looked_at = health(answers)
    return result | {"exact_match": matched / len(tasks), "stopped": looked_at.pop("ended")} | looked_at


def open_answers(
    model: GPT,
    tokenizer: TextTokenizer,
    rows: Sequence[Row],
    batch_size: int,
    max_new_tokens: int,
    reference: GPT | None,
) -> dict[str, float]:
    """Health of greedy answers to the first OPEN_PROMPTS different prompts of preference rows; beside a reference also
    their length against its answers."""
    rendered = (render_chat(tokenizer, row.value["chosen"][:-1], add_generation_prompt=True).ids for row in rows)
    fitting = dict.fromkeys(tuple(ids) for ids in rendered if len(ids) < model.config.max_seq_len)
    prompts = list(fitting)[:OPEN_PROMPTS]
    if not prompts:
        return {}

    def look_at(asked: GPT) -> dict[str, float]:
        return health(answer_ids(asked, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size))

    found = look_at(model)
    if reference is not None:
        found["length_ratio"] = found["answer_tokens"] / max(1.0, look_at(reference)["answer_tokens"])
    return found


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
