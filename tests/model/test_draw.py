"""Answers drawn in groups: the same as alone, with the log-probabilities that the whole forward pass gives."""

import pytest
import torch

from model.draw import Drawn, draw

PROMPTS = [[5, 9, 2, 40, 7, 11, 30], [3], [60, 1, 4]]
STOP = list(range(0, 97, 12))


def uniforms(rows: int, steps: int = 12) -> torch.Tensor:
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(1))


def drawn(model, prompts=PROMPTS, numbers=None, copies: int = 4, **settings) -> list[Drawn]:
    numbers = uniforms(len(prompts) * copies) if numbers is None else numbers
    settings = {"max_new_tokens": 12, "temperature": 0.8, "stop_ids": STOP} | settings
    return draw(model, prompts, numbers, copies=copies, **settings)


@torch.no_grad()
def said(model, prompt: list[int], answer: Drawn, temperature: float) -> torch.Tensor:
    """log-probabilities of all that could have followed at each token of an answer, by the network without a cache."""
    logits = model(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_logps_and_entropies_are_those_of_the_whole_forward_pass(make_model, temperature) -> None:
    model = make_model(qk_norm=True)
    answers = drawn(model, temperature=temperature)
    assert len({tuple(answer.ids) for answer in answers}) == 12 and len({len(answer.ids) for answer in answers}) > 3
    for i, answer in enumerate(answers):
        logps = said(model, PROMPTS[i // 4], answer, temperature)
        expected = logps.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=3e-5, rtol=0)
        assert answer.entropy == pytest.approx(float(-(logps.exp() * logps).sum()), abs=1e-3)


def test_an_answer_is_the_same_alone_and_in_a_batch(make_model) -> None:
    model, numbers = make_model(), uniforms(12)
    together = drawn(model, numbers=numbers)
    for i, prompt in enumerate(PROMPTS):
        for k in range(4):
            (alone,) = drawn(model, [prompt], numbers[4 * i + k : 4 * i + k + 1], copies=1)
            assert alone.ids == together[4 * i + k].ids


def test_an_answer_ends_with_a_stop_token_or_is_cut(make_model) -> None:
    answers = drawn(make_model(max_seq_len=16))
    for i, answer in enumerate(answers):
        ended = answer.finish_reason == "stop"
        assert (answer.ids[-1] in STOP) == ended and not set(answer.ids[:-1]) & set(STOP)
        assert ended or len(answer.ids) == min(12, 16 - len(PROMPTS[i // 4]))
        assert len(answer.logps) == len(answer.ids)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_tokens_come_as_often_as_they_are_likely_and_never_beyond_the_tokenizer(make_model) -> None:
    model, prompt, copies = make_model(), PROMPTS[0], 4000
    numbers = (torch.arange(copies)[:, None] + 0.5) / copies  # evenly spread, so no luck is in it
    firsts = torch.tensor([a.ids[0] for a in drawn(model, [prompt], numbers, copies, max_new_tokens=1, vocab_size=90)])
    shares = torch.bincount(firsts, minlength=97) / copies
    likely = (model(torch.tensor([prompt]))[0, -1] / 0.8)[:90].softmax(-1)
    assert (shares[:90] - likely).abs().max() < 1e-3 and shares[90:].sum() == 0
