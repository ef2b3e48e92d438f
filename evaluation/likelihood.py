"""How likely texts are after others: token ids in, log-probabilities out, what texts share computed once.

    log_likelihoods(model, [[Pair([1, 40, 41, 42], 2), Pair([1, 40, 43], 2)]], batch_size=16)
    -> [[Likelihood(nats=-5.1, tokens=2, greedy=False), Likelihood(nats=-1.2, tokens=1, greedy=True)]]

The pairs of a group (choices after one question) share a beginning. It stands once in a batch, and the rest of each
pair is a branch behind it (dataset/batch.py shows how that is laid out), so nothing is padding and nothing is computed
twice. Groups go through the network by length; which stand in one batch depends neither on the number of ranks nor on
who computes it, so that any number of ranks finds the same.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import TextTokenizer
from dataset.batch import Batch
from dataset.forms import start_document
from dataset.loader import branches, cumulative, lay_out, tensors
from model import GPT
from model.attention import Layout
from model.gpt import Places, chunks

T = TypeVar("T")


class Pair(NamedTuple):
    """A context and what is judged after it."""

    ids: list[int]
    start: int  # the first token that is judged; at least 1


class Likelihood(NamedTuple):
    nats: float  # log p of the judged tokens
    tokens: int  # how many they are
    greedy: bool  # whether each of them was the likeliest


class Ranks(NamedTuple):
    """Processes that share work, each of which holds the whole model."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]  # a value of every rank, on every rank

    def share(self, tasks: Sequence[T], do: Callable[[T], list[tuple[int, Any]]], what: str) -> dict[int, Any]:
        """Do every rank's tasks, each of which gives numbered results; all results, on every rank."""
        own = tqdm(tasks[self.rank :: self.size], desc=what, leave=False, disable=True if self.rank else None)
        done = [result for task in own for result in do(task)]
        return {number: result for results in self.gather(done) for number, result in results}


ALONE = Ranks(0, 1, lambda value: [value])


def split(tokenizer: TextTokenizer, context: str, continuation: str) -> Pair:
    """Ids of both texts together, and where they part from those of the context alone.

    White space at the context's end goes over to the continuation, whose first token it often is a part of (" ice").
    What is read begins with `<s>`; of a tokenizer without one, an empty context is its end token.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(whole, tokenizer.encode(kept), strict=False)))
    ids = start_document(tokenizer, whole)
    start = len(ids) - len(whole) + same
    return Pair(ids, start) if start else Pair([tokenizer.eos_id, *ids], 1)


def fit(pair: Pair, context: int) -> Pair | None:
    """Without so many of its first tokens that the rest fits, the last one being judged and not read; None where what
    is judged does not fit."""
    over = max(0, len(pair.ids) - (context + 1))
    return Pair(pair.ids[over:], pair.start - over) if over < pair.start else None


def log_likelihoods(
    model: GPT, groups: Sequence[Sequence[Pair]], *, batch_size: int, ranks: Ranks = ALONE
) -> list[list[Likelihood]]:
    """Of every pair of every group, in order. `batch_size` counts groups. Every pair fits the model's context.

    Long groups go first: where memory does not suffice, it runs out at once and not at the end.
    """
    order = sorted(range(len(groups)), key=lambda i: -sum(len(pair.ids) for pair in groups[i]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def do(numbers: list[int]) -> list[tuple[int, list[Likelihood]]]:
        return list(zip(numbers, ask(model, [groups[i] for i in numbers]), strict=True))

    found = ranks.share(batches, do, "judging")
    return [found[i] for i in range(len(groups))]


def ask(model: GPT, groups: Sequence[Sequence[Pair]]) -> list[list[Likelihood]]:
    batch = lay_pairs(groups).to(next(model.parameters()).device)
    with torch.inference_mode():
        nll, hits = model(
            batch.input_ids, batch.position_ids, batch.labels, learnt=batch.learnt, criterion=judge,
            layout=Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens),
        )  # fmt: skip
    lengths = [len(pair.ids) - pair.start for group in groups for pair in group]
    each = zip(nll.cpu().double().split(lengths), hits.cpu().split(lengths), strict=True)
    found = [Likelihood(-float(own.sum()), len(own), bool(hit.all())) for own, hit in each]
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [found[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]


def judge(places: Places) -> tuple[Tensor, Tensor]:
    """Of every place that is judged: -log p of its token, nats, and whether that is the likeliest; both (tokens,)."""
    nll = torch.empty(len(places.hidden), device=places.hidden.device)
    hits = torch.empty(len(places.hidden), device=places.hidden.device, dtype=torch.bool)
    for part in chunks(places.hidden, places.weight):
        logits, targets = places.hidden[part] @ places.weight.T, places.targets[part]
        nll[part] = -logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        hits[part] = logits.argmax(-1) == targets
    return nll, hits


def shared(group: Sequence[Pair]) -> int:
    """Tokens that all pairs of a group begin with and none of them is judged by."""
    columns = zip(*(pair.ids[: pair.start] for pair in group), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def lay_pairs(groups: Sequence[Sequence[Pair]]) -> Batch:
    """One row: the first pair of a group whole, then the others, from the last token on that all share."""
    runs: list[np.ndarray] = []
    firsts, leaders, judged = [], [], []
    for group in groups:
        leader, same = len(runs), max(0, shared(group) - 1)
        for i, pair in enumerate(group):
            first = same if i else 0
            runs.append(np.array(pair.ids[first:], dtype=np.int64))
            firsts.append(first)
            leaders.append(leader if first else len(runs) - 1)
            judged += [False] * (pair.start - first - 1) + [True] * (len(pair.ids) - pair.start)
    shape, first_places = (1, len(judged)), np.array(firsts, dtype=np.int64)
    laid = lay_out(runs, first_places, np.zeros(len(runs), dtype=np.int64), shape)
    places, lengths, tokens = branches(laid, first_places, np.array(leaders, dtype=np.int64), shape)
    return Batch(
        **tensors(laid, np.array(judged, dtype=bool), shape, 0), cu_seqlens=cumulative(lengths.cumsum(), len(lengths)),
        longest=int(lengths.max()), places=torch.from_numpy(places), tokens=torch.from_numpy(tokens), row_ids=[],
        real_tokens=len(judged),
    )  # fmt: skip
