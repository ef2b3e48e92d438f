"""A step over the cache says what the whole forward pass says, its plain twin."""

import pytest
import torch

from model import generate
from model.decode import WINDOW, CachedGPT, few_shapes, onednn_fits
from tests.model.test_generate import greedy_without_cache

PROMPTS = [[5, 9, 2, 40, 7, 11, 30], [3], [60, 1, 4]]
NEXT = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(2))
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
SHAPES = [
    {},
    {"qk_norm": True},
    {"tie_embeddings": False, "n_kv_heads": 4},
    {"n_kv_heads": 1, "rope_scaling": LLAMA3},
    {"dropout": 0.5},
]


@torch.no_grad()
def whole(model, ids: list[int]) -> torch.Tensor:
    """What follows, by the network without a cache: (vocabulary,)."""
    return model(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_equals_the_whole_forward_pass(make_model, shape, rows, static):
    model = make_model(**shape)
    prompts = PROMPTS[:rows]
    decoder = CachedGPT(model.train(), rows, 40, static)  # dropout never acts here
    model.eval()
    logits = decoder.add(prompts)
    for step in range(NEXT.shape[1] + 1):
        texts = [prompt + row[:step].tolist() for prompt, row in zip(prompts, NEXT, strict=False)]
        expected = torch.stack([whole(model, text) for text in texts])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        if step < NEXT.shape[1]:
            logits = decoder.step(NEXT[:rows, step])


@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16_rounds_no_more_than_the_whole_forward_pass(make_model, rows):
    model = make_model(qk_norm=True)
    texts = [[*prompt, 8] for prompt in PROMPTS[:rows]]
    exact = torch.stack([whole(model, text) for text in texts])
    model.to(torch.bfloat16)
    decoder = CachedGPT(model, rows, 10)
    decoder.add(PROMPTS[:rows])
    found = decoder.step(torch.full((rows,), 8))
    assert found.dtype == torch.bfloat16
    plain = torch.stack([whole(model, text) for text in texts])
    assert (found - exact).square().mean() < 2 * (plain - exact).square().mean()


def test_attention_sees_past_one_window(make_model):
    model = make_model(max_seq_len=3 * WINDOW)
    answer = generate(model, [[1, 2, 3]], max_new_tokens=2 * WINDOW, temperature=0)[0]
    assert answer.ids == greedy_without_cache(model, [1, 2, 3], 2 * WINDOW)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_leave_change_nothing_for_the_others(make_model, static):
    model = make_model()
    decoder = CachedGPT(model, 3, 40, static)
    decoder.add(PROMPTS)
    decoder.step(torch.tensor([1, 2, 3]))
    decoder.keep([0, 2])
    two = decoder.step(torch.tensor([4, 5])).clone()
    decoder.keep([1])
    one = decoder.step(torch.tensor([6])).clone()
    expected = [whole(model, PROMPTS[0] + [1, 4]), whole(model, PROMPTS[2] + [3, 5])]
    torch.testing.assert_close(two, torch.stack(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(one[0], whole(model, PROMPTS[2] + [3, 5, 6]), atol=2e-5, rtol=1e-5)


def test_a_full_row_does_not_disturb_the_others(make_model):
    model = make_model()
    decoder = CachedGPT(model, 2, 4)
    decoder.add([[1, 2, 3], [4]])
    for step in range(3):
        logits = decoder.step(NEXT[:2, step])
    torch.testing.assert_close(logits[1], whole(model, [4, *NEXT[1, :3].tolist()]), atol=2e-5, rtol=1e-5)


def test_prompts_of_all_lengths_meet_few_shapes():
    found = {rows: few_shapes(rows) for rows in range(1, 2049)}
    assert all(rows <= size <= rows * 9 / 8 for rows, size in found.items()) and len(set(found.values())) == 72


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(-1.5),  # no version counter sees this
        lambda p: p.data.copy_(p.flip(0)),
        lambda p: setattr(p, "data", p.data.roll(1, 0)),
    ],
)
def test_weights_changed_between_calls_are_never_stale(make_model, rows, change):
    model = make_model()
    prompts = PROMPTS[:rows]
    before = generate(model, prompts, max_new_tokens=8, temperature=0)
    for parameter in model.parameters():
        change(parameter)
    after = generate(model, prompts, max_new_tokens=8, temperature=0)
    assert [answer.ids for answer in after] == [greedy_without_cache(model, prompt, 8) for prompt in prompts]
    assert after != before


def test_the_forward_pass_and_autograd_go_on_after_generating(make_model):
    model = make_model().train()
    generate(model, PROMPTS, max_new_tokens=3)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_types_fall_back_to_the_ordinary_linear_layer(make_model):
    assert not onednn_fits(torch.empty(2, 2, dtype=torch.float64)) and not onednn_fits(torch.empty(2, 2, device="meta"))
    model = make_model().double()
    answers = generate(model, PROMPTS, max_new_tokens=8, temperature=0)
    assert [answer.ids for answer in answers] == [greedy_without_cache(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph: needs a GPU")
def test_a_recorded_step_gives_the_same_text(make_model):
    expected = generate(make_model(), PROMPTS, max_new_tokens=20, temperature=0, stop_ids=[3])
    assert generate(make_model().cuda(), PROMPTS, max_new_tokens=20, temperature=0, stop_ids=[3]) == expected
