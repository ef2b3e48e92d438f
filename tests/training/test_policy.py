"""The losses of reinforcement learning beside their papers, written out answer by answer in plain numbers (float64)."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from dataset.batch import RolloutBatch
from training import GRPO, GRPOConfig, load_config
from training.objectives import Output, policy_of
from training.policy import LOSSES, Tokens, group_advantages, k3, overlong_penalty
from training.preference import own_flags

# answers of two prompts: log-probabilities now, at which they were drawn, and of the start; the answer's advantage
ANSWERS = [
    ([-0.5, -1.2, -0.1], [-0.9, -1.0, -0.1], [-0.7, -1.3, -0.2], 0.75),
    ([-2.0], [-1.0], [-1.5], -0.25),
    ([-0.3, -0.6, -1.9, -0.2, -3.0], [-0.35, -1.0, -1.2, -0.25, -2.0], [-0.5] * 5, -0.25),
    ([-1.0, -1.1], [-1.0, -1.1], [-1.0, -1.4], -0.25),
    ([-0.4, -5.0], [-2.4, -4.0], [-1.0, -5.0], 1.5),
]
KL, MOST = 0.3, 7


def ratio(now: float, then: float) -> float:
    return math.exp(now) / math.exp(then)


def surrogate(r: float, a: float, low: float, high: float) -> float:
    return min(r * a, min(max(r, 1 - low), 1 + high) * a)


def divergence(now: float, start: float) -> float:
    return math.exp(start) / math.exp(now) - (start - now) - 1


def token_objective(low: float, high: float):
    def each(now: float, then: float, start: float, a: float) -> float:
        return surrogate(ratio(now, then), a, low, high) - KL * divergence(now, start)

    return each


def grpo(answers) -> float:
    each = token_objective(0.2, 0.2)
    means = [sum(each(*t, a) for t in zip(now, old, start, strict=True)) / len(now) for now, old, start, a in answers]
    return -sum(means) / len(answers)


def dapo(answers) -> float:
    each = token_objective(0.2, 0.28)
    values = [each(*t, a) for now, old, start, a in answers for t in zip(now, old, start, strict=True)]
    return -sum(values) / len(values)


def dr_grpo(answers) -> float:
    each = token_objective(0.2, 0.2)
    sums = [sum(each(*t, a) for t in zip(now, old, start, strict=True)) for now, old, start, a in answers]
    return -sum(sums) / (len(answers) * MOST)


def gspo(answers) -> float:
    total = 0.0
    for now, old, start, a in answers:
        s = math.prod(ratio(*pair) for pair in zip(now, old, strict=True)) ** (1 / len(now))
        kl = sum(divergence(*pair) for pair in zip(now, start, strict=True)) / len(now)
        total += surrogate(s, a, 3e-4, 4e-4) - KL * kl
    return -total / len(answers)


PAPERS = {"grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo, "gspo": gspo}


def batch_of(answers=ANSWERS) -> RolloutBatch:
    """The answers end to end, as the objective gets them: their first place is a prompt's last token."""
    lengths = torch.tensor([len(now) for now, *_ in answers])
    total, nothing = int(lengths.sum()), torch.zeros(0)
    each = torch.repeat_interleave(torch.arange(len(answers)), lengths)
    columns = [torch.tensor([x for answer in answers for x in answer[i]], dtype=torch.float64) for i in (1, 2)]
    return RolloutBatch(
        nothing, nothing, nothing, nothing, 0, torch.arange(total) + 1, [0], total + 1, total,
        torch.tensor([answer[3] for answer in answers], dtype=torch.float64)[each], *columns, each, lengths,
        torch.tensor([float(len(answers)), 2.0] + [1.0] * 9, dtype=torch.float64),
    )  # fmt: skip


def learnt(name: str, answers=ANSWERS, **flags) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, its gradient by the log-probabilities, and what is logged."""
    objective, batch = GRPO(name, kl=flags.pop("kl", KL), max_new_tokens=MOST, **flags), batch_of(answers)
    now = torch.tensor([x for answer in answers for x in answer[0]], dtype=torch.float64, requires_grad=True)
    loss, sums = objective(Output(torch.cat([torch.zeros(1, dtype=torch.float64), -now])[None]), batch)
    weight = objective.weight(batch)
    (loss / weight).backward()
    assert now.grad is not None and set(sums) == set(objective.names)
    logged = objective.metrics({name: float(value) for name, value in sums.items()}, weight)
    return float(loss.detach()) / weight, now.grad, logged


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_is_its_papers(name: str) -> None:
    loss, gradient, logged = learnt(name)
    paper = PAPERS[name]
    assert loss == pytest.approx(paper(ANSWERS), rel=1e-12)
    assert logged["loss"] == pytest.approx(loss)
    place, step = 0, 1e-6
    for i, (now, *others) in enumerate(ANSWERS):
        for t in range(len(now)):  # the paper's own slope, by differences
            sides = []
            for sign in (1, -1):
                moved = [*now[:t], now[t] + sign * step, *now[t + 1 :]]
                sides.append(paper([*ANSWERS[:i], (moved, *others), *ANSWERS[i + 1 :]]))
            assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-8), (i, t)
            place += 1


def test_cispo_weighs_the_likelihood_by_a_clipped_ratio_without_a_gradient() -> None:
    _, gradient, logged = learnt("cispo", clip_high=1.0, kl=0.0)
    flat = [(n, o, a) for now, old, _, a in ANSWERS for n, o in zip(now, old, strict=True)]
    expected = [-min(ratio(n, o), 2.0) * a / len(flat) for n, o, a in flat]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert logged["clip_share"] == pytest.approx(sum(ratio(n, o) > 2 for n, o, _ in flat) / len(flat))


def test_clipping_ends_the_gradient_where_the_ratio_has_gone_far_enough() -> None:
    _, gradient, logged = learnt("dapo", kl=0.0)
    flat = [(ratio(n, o), a) for now, old, _, a in ANSWERS for n, o in zip(now, old, strict=True)]
    stopped = [(r > 1.28 and a > 0) or (r < 0.8 and a < 0) for r, a in flat]
    assert [float(g) == 0 for g in gradient] == stopped and any(stopped) and not all(stopped)
    assert logged["clip_share"] == pytest.approx(sum(stopped) / len(stopped))


def test_losses_differ_once_an_update_is_off_policy_and_tokens_weigh_as_said() -> None:
    gradients = {name: learnt(name, kl=0.0)[1] for name in LOSSES}
    names = list(gradients)
    assert all(not torch.allclose(gradients[a], gradients[b]) for i, a in enumerate(names) for b in names[:i])
    on_policy = [(old, old, old, a) for _, old, _, a in ANSWERS]
    first = {name: learnt(name, on_policy, kl=0.0)[1] for name in LOSSES}
    # on-policy nothing is clipped: what is left is what a token weighs
    torch.testing.assert_close(first["dapo"], first["cispo"])
    torch.testing.assert_close(first["grpo"], first["gspo"])
    torch.testing.assert_close(first["dr_grpo"] * len(ANSWERS) * MOST, first["dapo"] * 13)
    lengths = torch.tensor([3.0] * 3 + [1.0] + [5.0] * 5 + [2.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(first["grpo"] * len(ANSWERS) * lengths, first["dapo"] * 13)


def test_advantages_are_measured_from_the_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert group_advantages(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4]
    scaled = group_advantages(rewards, "std")
    std = math.sqrt(4 * 0.25 / 3)  # of a sample
    torch.testing.assert_close(scaled[0, 0].item(), 0.5 / (std + 1e-4))
    assert scaled[1].tolist() == [0.0] * 4
    assert float(group_advantages(torch.full((1, 8), 0.7)).abs().max()) == 0.0  # no rounding is learnt from


def test_a_long_answer_loses_the_more_the_nearer_it_comes_to_being_cut() -> None:
    assert [overlong_penalty(n, 20, 10) for n in (1, 10, 15, 20)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(20, 20, 0) == 0.0


def test_k3_is_the_divergence_on_average() -> None:
    p, q = (torch.tensor(each, dtype=torch.float64) for each in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    estimates = k3(p.log(), q.log())
    assert (estimates > 0).all() and float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()))


def test_the_temperature_is_that_of_the_distribution_drawn_from(make_model) -> None:
    """log softmax(logits / T) of the label, by the objective's own criterion."""
    model, ids = make_model(), torch.tensor([[5, 9, 2, 40]])
    labels = torch.tensor([[9, 2, 40, 7]])
    (nll,) = model(ids, labels=labels, criterion=lambda places: GRPO(temperature=0.7).criterion(places, batch_of()))
    expected = -(model(ids) / 0.7).log_softmax(-1).gather(2, labels[..., None])[..., 0]
    torch.testing.assert_close(nll, expected, atol=2e-5, rtol=1e-5)


def test_a_gap_and_a_kl_of_nothing_are_nothing() -> None:
    _, _, logged = learnt("dapo", [(old, old, old, a) for _, old, _, a in ANSWERS])
    assert logged["kl"] == logged["logp_gap"] == logged["clip_share"] == 0
    assert logged["entropy"] == 1 and logged["reward"] == pytest.approx(1 / 5)


def test_each_loss_has_its_own_defaults_and_refuses_what_it_does_not_read() -> None:
    assert set(LOSSES) == set(get_args(get_type_hints(GRPOConfig)["loss_type"]))
    assert own_flags("cispo", LOSSES) == {"clip_high": 4.0}
    config = load_config(GRPOConfig, ["--loss_type", "gspo", "--clip_low", "0.01"])
    assert (config.clip_low, config.clip_high) == (0.01, 4e-4)
    assert policy_of(config).unit == "answers" and policy_of(load_config(GRPOConfig, [])).unit == ""
    with pytest.raises(ValueError, match="--clip_low is 0.1, and --loss_type cispo does not read it"):
        load_config(GRPOConfig, ["--loss_type", "cispo", "--clip_low", "0.1"])
    with pytest.raises(ValueError, match="names 2 rewards and --reward_weights 1 weights"):
        load_config(GRPOConfig, ["--reward", "number", "format", "--reward_weights", "1"])
    with pytest.raises(ValueError, match="--overlong_buffer is 256; it must be less than --max_new_tokens 256"):
        load_config(GRPOConfig, ["--overlong_buffer", "256"])
    with pytest.raises(ValueError, match="--reward_weights is 'one'; it must be a number"):
        load_config(GRPOConfig, ["--reward_weights", "one"])


def test_where_no_group_has_variance_it_is_said() -> None:
    record = {"zero_variance": 1.0, "reward": 0.0, "step": 3}
    (said,) = GRPO().warnings(record)
    assert "at step 3" in said and "--temperature" in said
    assert GRPO().warnings(record | {"zero_variance": 0.9}) == []


def test_gspo_gives_every_token_its_answers_ratio() -> None:
    now, then = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
    tokens = Tokens(now, then, torch.ones(3), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    ratios = LOSSES["gspo"]().ratios(tokens)  # type: ignore[attr-defined]
    torch.testing.assert_close(ratios, torch.tensor([math.exp(0.25), math.exp(0.25), math.exp(-2.0)]))
