"""Sampling: batches, caches and padding change nothing, settings mean what transformers' mean."""

from importlib import import_module

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import Generation, generate, stream
from model.decode import CachedGPT
from model.generate import penalise_repetition, sample

PROMPTS = [[5, 9, 2, 40, 7, 11, 30], [3], [60, 1, 4]]


def greedy_without_cache(model, prompt: list[int], steps: int, penalty: float = 1.0) -> list[int]:
    """The plain twin: the whole sequence through the network for every token."""
    ids = list(prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        ids.append(int(processor(torch.tensor([ids]), logits).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.7])
def test_greedy_batch_equals_prompts_alone_without_cache(make_model, penalty):
    model = make_model()
    expected = [greedy_without_cache(model, prompt, 20, penalty) for prompt in PROMPTS]
    settings = {"max_new_tokens": 20, "temperature": 0, "repetition_penalty": penalty}
    assert [answer.ids for answer in generate(model, PROMPTS, **settings)] == expected
    assert [generate(model, [prompt], **settings)[0].ids for prompt in PROMPTS] == expected
    assert len({tuple(ids) for ids in expected}) == 3  # else batching could not go wrong


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        (
            {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_samples_follow_the_distribution_of_transformers(settings, processors):
    draws = 20_000
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(4))
    expected = LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    tokens = sample(
        logits.expand(draws, -1), **full, uniform=torch.rand(draws, 1, generator=torch.Generator().manual_seed(5))
    )
    found = torch.bincount(tokens.flatten(), minlength=12) / draws
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])  # the ends of what torch.rand gives
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.8), (0.3, 0, 1.0)])
def test_no_random_number_draws_the_impossible(uniform, settings):
    logits = torch.full((1, 6400), -torch.inf)
    logits[0, [17, 800, 6300]] = torch.tensor([1.0, 3.0, 2.0])
    token = sample(logits, *settings, uniform=torch.tensor([[uniform]])).item()
    assert token in ({800, 6300} if settings[1] or settings[2] < 1 else {17, 800, 6300})


@pytest.mark.parametrize("spread", [0.1, 6.0])  # of a model that knows nothing, and of one that knows
def test_a_nucleus_found_among_few_is_that_of_all_tokens(spread, monkeypatch):
    generator = torch.Generator().manual_seed(8)
    logits = spread * torch.randn(64, 1000, generator=generator)
    uniform = torch.rand(64, 1, generator=generator)
    few = (logits / 0.7).softmax(-1).topk(import_module("model.generate").FEW).values.sum(-1) >= 0.9
    assert bool(few.all()) == (spread > 1)  # both ways are taken
    tokens = sample(logits, 0.7, 0, 0.9, uniform)
    monkeypatch.setattr(import_module("model.generate"), "FEW", 1000)
    again = sample(logits, 0.7, 0, 0.9, uniform)
    # of two that are alike but for rounding, either may come first
    torch.testing.assert_close(logits.gather(1, tokens), logits.gather(1, again), rtol=0, atol=1e-5)


def test_texts_have_the_probabilities_the_model_gives_them(make_model):
    """Pearson's chi-square over all texts of two tokens, each row drawing by its own numbers."""
    model, rows = make_model(vocab_size=8), 4000
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]]))[0, -1].div(2).softmax(-1)
        second = model(torch.tensor([[1, 2, token] for token in range(8)]))[:, -1].div(2).softmax(-1)
    expected = (first[:, None] * second).flatten() * rows
    answers = generate(model, [[1, 2]] * rows, max_new_tokens=2, temperature=2.0, seed=3)
    found = torch.bincount(torch.tensor([a.ids[0] * 8 + a.ids[1] for a in answers]), minlength=64)
    common = expected >= 5
    assert common.sum() > 20
    statistic, freedom = ((found - expected)[common] ** 2 / expected[common]).sum(), int(common.sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert found[~common].sum() < expected[~common].sum() + 4 * expected[~common].sum().sqrt() + 1


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(6))
    earlier = torch.tensor([[0, 3, 3, 5], [11, 2, 7, 1]])
    seen = torch.zeros(2, 12, dtype=torch.bool).scatter(1, earlier, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(earlier, logits)
    assert torch.equal(penalise_repetition(logits, seen, 1.3), expected)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(make_model):
    model = make_model()
    free = [answer.ids for answer in generate(model, PROMPTS, max_new_tokens=10, temperature=0)]
    stop = next(token for token in free[0][1:] if token not in free[1])
    cut = free[0].index(stop)
    answers = generate(model, PROMPTS[:2], max_new_tokens=10, temperature=0, stop_ids=[stop])
    assert answers == [Generation(free[0][:cut], "stop"), Generation(free[1], "length")]


def test_a_stop_token_at_the_very_last_step_is_a_stop(make_model):
    model = make_model()
    first = generate(model, PROMPTS[:1], max_new_tokens=1, temperature=0)[0]
    assert first.finish_reason == "length"
    again = generate(model, PROMPTS[:1], max_new_tokens=1, temperature=0, stop_ids=first.ids)[0]
    assert again == Generation([], "stop")


def test_stream_yields_a_token_a_step_and_none_after_the_end(make_model):
    model = make_model()
    whole = [answer.ids for answer in generate(model, PROMPTS, max_new_tokens=8, temperature=0)]
    stop = next(token for token in whole[0] if token not in whole[1])
    steps = list(stream(model, PROMPTS[:2], max_new_tokens=8, temperature=0, stop_ids=[stop]))
    end = whole[0].index(stop)
    assert [step[0] for step in steps] == [*whole[0][: end + 1], *[None] * (7 - end)]
    assert [step[1] for step in steps] == whole[1]


def test_a_full_context_ends_a_row_by_length(make_model):
    model = make_model()  # a context of 64
    long, short = list(range(60)), [7, 8]
    answers = generate(model, [long, short], max_new_tokens=100, temperature=0)
    assert [len(answer.ids) for answer in answers] == [4, 62]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert answers[0].ids == greedy_without_cache(model, long, 4)
    assert answers[1].ids == greedy_without_cache(model, short, 62)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 5.0}, {"repetition_penalty": 0.1}])
def test_ids_beyond_the_tokenizer_are_never_drawn(make_model, settings):
    model = make_model()
    settings = {"max_new_tokens": 40, "seed": 0} | settings
    free = [answer.ids for answer in generate(model, PROMPTS, **settings)]
    for size in (32, 3, 1):
        assert max(max(ids) for ids in free) >= size
        assert all(max(answer.ids) < size for answer in generate(model, PROMPTS, vocab_size=size, **settings))
    whole = generate(model, PROMPTS, vocab_size=model.config.vocab_size, **settings)
    assert [answer.ids for answer in whole] == free


def test_one_seed_gives_one_text(make_model):
    model = make_model()
    texts = [generate(model, PROMPTS, max_new_tokens=12, seed=seed, temperature=2.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_answer_does_not_depend_on_the_other_prompts(make_model):
    model = make_model()
    settings = {"temperature": 1.5, "seed": 5}
    free = generate(model, PROMPTS, max_new_tokens=20, **settings)
    assert generate(model, PROMPTS[:1], max_new_tokens=20, **settings) == free[:1]
    assert generate(model, [[9, 9, 9, 9], PROMPTS[1]], max_new_tokens=20, **settings)[1] == free[1]
    assert [a.ids[:7] for a in free] == [a.ids for a in generate(model, PROMPTS, max_new_tokens=7, **settings)]
    same = generate(model, PROMPTS[:1] * 3, max_new_tokens=20, **settings)
    assert len({tuple(answer.ids) for answer in same}) == 3  # places draw by different numbers


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_finished_rows_leave_the_batch_and_no_answer_changes(make_model, monkeypatch, temperature):
    model = make_model()
    prompts = [[row, row + 1] for row in range(12)]
    settings = {"max_new_tokens": 30, "temperature": temperature, "seed": 1, "stop_ids": [3, 10, 41]}
    settings["repetition_penalty"] = 1.3
    left = []
    keep = CachedGPT.keep
    monkeypatch.setattr(CachedGPT, "keep", lambda self, rows: (left.append(len(rows)), keep(self, rows)))
    answers = generate(model, prompts, **settings)
    assert len(left) > 1 and left == sorted(left, reverse=True)
    for row in (0, 4, 11):
        assert generate(model, prompts[: row + 1], **settings)[row] == answers[row]
    monkeypatch.setattr(import_module("model.generate"), "LEAVE", 0)
    assert generate(model, prompts, **settings) == answers
    assert len({answer.finish_reason for answer in answers}) == 2


def test_a_seed_leaves_the_global_random_state_alone(make_model):
    model = make_model()
    before = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 64], {}, "prompt 0 has 64 tokens.*context of 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"top_k": -2}, "top_k is -2"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_settings_out_of_range_are_named(make_model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompts, **{"max_new_tokens": 4} | settings)


def test_a_temperature_next_to_nothing_is_none(make_model):
    model = make_model()
    greedy, cold = (generate(model, [[1, 7, 9]], max_new_tokens=8, temperature=t, seed=0) for t in (0, 4.5e-51))
    assert cold == greedy
