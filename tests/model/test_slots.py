"""Sequences that come and go: each has the numbers that it has alone, bit for bit, and nothing is computed twice."""

import random

import pytest
import torch

from model.decode import WINDOW, CachedGPT
from model.generate import generate
from model.slots import Slots, cache_bytes, common_length
from tests.model.test_adapters import prefixed
from tests.model.test_decode import whole

# widths at which oneDNN adds up one row in another order than two, and MKL long rows in another than short ones
WIDE = {"dim": 512, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 1408, "n_layers": 1, "max_seq_len": 400}
PREFIX = [1, 5, *range(20, 60)]


def greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def alone(model, prompt: list[int], tokens: int, slots: int) -> list[torch.Tensor]:
    """Logits of a greedy answer to a prompt that has the server for itself."""
    cache = Slots(model, slots, model.config.max_seq_len)
    found = [cache.join(prompt)[0]]
    for _ in range(tokens - 1):
        found.append(cache.step([greedy(found[-1])])[0].clone())
    return found


def crowd(model, prompts: list[list[int]], tokens: list[int], slots: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """Logits of greedy answers to prompts that come at any step and leave when they have so many tokens."""
    rng, cache = random.Random(seed), Slots(model, slots, model.config.max_seq_len)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    waiting, rows = list(range(len(prompts))), list[int]()
    while waiting or rows:
        if rows:
            for number, logits in zip(rows, cache.step([greedy(found[number][-1]) for number in rows]), strict=True):
                found[number].append(logits.clone())
        while waiting and cache.free and (not rows or rng.random() < 0.6):
            rows.append(waiting.pop(0))
            found[rows[-1]].append(cache.join(prompts[rows[-1]])[0])
        for number in [number for number in rows if len(found[number]) == tokens[number]]:
            place = rows.index(number)
            cache.leave(place)
            last = rows.pop()
            if last != number:
                rows[place] = last
    return found


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "max_seq_len": 3 * WINDOW + 10}, WIDE], ids=["", "qk", "wide"])
def test_numbers_are_the_same_alone_and_in_a_crowd_bit_for_bit(make_model, shape):
    model, rng = make_model(**shape), random.Random(1)
    longest = model.config.max_seq_len
    lengths = [rng.randint(1, longest - 24) for _ in range(6)]
    prompts = [[number, *(rng.randrange(97) for _ in range(length))] for number, length in enumerate(lengths)]
    tokens = [rng.randint(1, 15) for _ in prompts]
    for prompt, expected, found in zip(prompts, tokens, crowd(model, prompts, tokens, slots=3), strict=True):
        assert torch.equal(torch.stack(found), torch.stack(alone(model, prompt, expected, slots=3)))


def test_numbers_are_those_of_the_whole_forward_pass(make_model):
    model = make_model()
    prompts = [[5, 9, 2, 40, 7, 11, 30], [3], [60, 1, 4], [5, 9, 2, 40, 7, 8], [3, 3], [5, 9, 2, 40, 7, 11, 30, 2]]
    for prompt, found in zip(prompts, crowd(model, prompts, [6] * len(prompts), slots=2), strict=True):
        text = list(prompt)
        for logits in found:
            torch.testing.assert_close(logits, whole(model, text), atol=3e-5, rtol=1e-5)
            text.append(greedy(logits))


def test_the_next_turn_finds_the_conversation_where_it_was(make_model):
    model = make_model()
    cache = Slots(model, 2, 64)
    answer = [greedy(cache.join(PREFIX)[0])]
    other, _ = cache.join([1, 5, 90])
    for _ in range(4):
        logits = cache.step([answer[-1], greedy(other)])
        answer.append(greedy(logits[0]))
    cache.leave(0)
    turn = [*PREFIX, *answer, 8, 70]
    logits, cached = cache.join(turn)
    assert cached == len(PREFIX) + len(answer) - 1  # the last token was drawn, and nothing computed behind it
    torch.testing.assert_close(logits, whole(model, turn), atol=3e-5, rtol=1e-5)


def test_prompts_that_begin_alike_share_it_and_spare_the_others_what_is_theirs(make_model):
    model = make_model()
    cache = Slots(model, 3, 64)
    cache.join([*PREFIX, 7])
    assert cache.join([*PREFIX, 9])[1] == len(PREFIX)  # of one that is in use
    assert cache.join([*PREFIX, 7])[1] == len(PREFIX)  # what follows the last token is always computed
    for _ in range(3):
        cache.leave(0)
    logits, cached = cache.join([*PREFIX[:10], 80, 81])  # of one that left: copied, for it may go on
    assert cached == 10
    torch.testing.assert_close(logits, whole(model, [*PREFIX[:10], 80, 81]), atol=3e-5, rtol=1e-5)
    assert sum(held[: len(PREFIX)] == PREFIX for held in cache.held) == 2
    assert cache.join([*PREFIX, 9, 4])[1] == len(PREFIX) + 1


def test_what_was_left_longest_ago_is_written_over(make_model):
    model = make_model()
    cache = Slots(model, 3, 64)
    assert cache.cache_bytes == cache_bytes(model, 3, 64)
    prompts = [[number] * 20 for number in (1, 2, 3)]
    for prompt in prompts:
        cache.join(prompt)
    for prompt in (prompts[1], prompts[0], prompts[2]):
        cache.leave(next(row for row, held in enumerate(cache.held) if held == prompt))
    cache.join([50] * 20)
    assert sorted(cache.held[row][0] for row in range(3)) == [1, 3, 50]


def test_generate_writes_the_same(make_model):
    model = make_model(**WIDE)
    prompts = [[3, 4, 5], [9] * 300]
    expected = [generate(model, [p], max_new_tokens=20, temperature=0)[0].ids for p in prompts]
    assert [[greedy(logits) for logits in alone(model, p, 20, 4)] for p in prompts] == expected


def test_a_learnt_prefix_stands_before_every_sequence(make_model):
    model = prefixed(make_model()).eval()
    prompts = [[5, 9, 2, 40], [5, 9, 2, 41, 7], [60], [5, 9, 2, 40, 3]]
    for prompt, found in zip(prompts, crowd(model, prompts, [4] * 4, slots=2), strict=True):
        torch.testing.assert_close(found[0], whole(model, prompt), atol=3e-5, rtol=1e-5)
        text = [*prompt, greedy(found[0]), greedy(found[1])]
        torch.testing.assert_close(found[2], whole(model, text), atol=3e-5, rtol=1e-5)


def test_a_row_may_be_read_in_pieces(make_model):
    model = make_model()
    network = CachedGPT(model, 2, 64)
    network.add([[1, 2, 3], [4, 5]])
    network.lengths.clear()  # both rows are given up, and read on
    logits = network.add([[6], [7, 8, 9]], held=[3, 2])
    expected = torch.stack([whole(model, [1, 2, 3, 6]), whole(model, [4, 5, 7, 8, 9])])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_common_length():
    assert [common_length([1, 2, 3], other) for other in ([], [1, 2], [1, 2, 4], [1, 2, 3, 4], [0])] == [0, 2, 2, 3, 0]
