"""Log-likelihoods of branches behind a shared beginning are those of whole sequences, one at a time."""

import random
from pathlib import Path

import pytest
import torch

from dataset import Tokenizer, load_tokenizer
from evaluation.likelihood import ALONE, Pair, Ranks, fit, log_likelihoods, split
from tests.dataset.foreign import CHATML, make_foreign_folder

GROUPS = [
    [Pair([1, 5, 6, 7, 8, 9], 4), Pair([1, 5, 6, 7, 20], 4), Pair([1, 5, 6, 7, 30, 31, 32], 4)],
    [Pair([1, 9], 1), Pair([1, 11, 12], 1)],
    [Pair([1, 40, 41, 42, 43], 3), Pair([1, 50, 51, 42, 43], 3)],  # what is judged is the same, after other texts
    [Pair([1, 60, 61, 62, 63, 64], 2), Pair([1, 60, 61, 70, 71], 3)],  # a token that grew over the border
    [Pair([80, 81, 82], 1), Pair([90, 91], 1)],  # nothing is shared
    [Pair([1, *range(2, 60)], 50)],
]


def alone(model, pair: Pair) -> tuple[float, bool]:
    with torch.no_grad():
        logps = model(torch.tensor([pair.ids[:-1]]))[0].double().log_softmax(-1)
    judged = range(pair.start - 1, len(pair.ids) - 1)
    nats = sum(float(logps[i, pair.ids[i + 1]]) for i in judged)
    return nats, all(int(logps[i].argmax()) == pair.ids[i + 1] for i in judged)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_pair_has_the_likelihood_of_its_sequence_alone(make_model, batch_size: int) -> None:
    model = make_model()
    ids = [1, 5]
    for _ in range(3):  # an answer that is the likeliest at each token
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    groups = [*GROUPS, [Pair(ids, 2), Pair([*ids[:-1], (ids[-1] + 1) % 97], 2)]]
    found = log_likelihoods(model, groups, batch_size=batch_size)
    for group, likely in zip(groups, found, strict=True):
        for pair, each in zip(group, likely, strict=True):
            nats, greedy = alone(model, pair)
            assert each.nats == pytest.approx(nats, abs=1e-4) and each.greedy == greedy
            assert each.tokens == len(pair.ids) - pair.start
    assert [each.greedy for each in found[-1]] == [True, False]


def test_ranks_find_what_one_process_does_to_the_last_bit(make_model) -> None:
    """The ranks of this test take turns: each gathers what those before have done, and the last has all."""
    rng = random.Random(0)
    groups = [[Pair([1, *(rng.randrange(97) for _ in range(rng.randint(3, 40)))], 2)] for _ in range(23)]
    model, done = make_model(), []

    def gather(own: object) -> list:
        done.append(own)
        return list(done)

    for rank in range(2):
        with pytest.raises(KeyError):  # a rank knows nothing of what others have not told
            log_likelihoods(model, groups, batch_size=4, ranks=Ranks(rank, 3, gather))
    found = log_likelihoods(model, groups, batch_size=4, ranks=Ranks(2, 3, gather))
    assert found == log_likelihoods(model, groups, batch_size=4, ranks=ALONE)
    assert [len(each) for each in done] == [8, 8, 7]


def test_a_text_is_split_where_its_tokens_part(tokenizer: Tokenizer) -> None:
    whole = [tokenizer.bos_id, *tokenizer.encode("Answer: yes")]
    for context, continuation in (("Answer:", " yes"), ("Answer: ", "yes")):
        assert split(tokenizer, context, continuation) == Pair(whole, 1 + len(tokenizer.encode("Answer:")))
    assert split(tokenizer, "", "yes") == Pair([tokenizer.bos_id, *tokenizer.encode("yes")], 1)
    grown = split(tokenizer, "the hou", "se")  # one token for "house": judged from there on
    assert tokenizer.decode(grown.ids) == "the house" and grown.start < 1 + len(tokenizer.encode("the hou"))


def test_what_does_not_fit_is_cut_at_its_beginning_and_nothing_that_is_judged_is_lost() -> None:
    pair = Pair(list(range(10)), 6)
    assert fit(pair, 9) == fit(pair, 50) == pair
    assert fit(pair, 8) == Pair(list(range(1, 10)), 5)
    assert fit(pair, 4) == Pair(list(range(5, 10)), 1)
    assert fit(pair, 3) is None


def test_a_tokenizer_without_a_beginning_reads_an_empty_context_as_its_end(tmp_path: Path) -> None:
    foreign = load_tokenizer(make_foreign_folder(tmp_path / "qwen", CHATML))
    assert foreign.bos_id is None
    assert split(foreign, "", "yes") == Pair([foreign.eos_id, *foreign.encode("yes")], 1)
    whole = foreign.encode("Answer: yes")
    assert split(foreign, "Answer:", " yes") == Pair(whole, len(foreign.encode("Answer:")))
