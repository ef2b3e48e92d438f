"""Which weights decay, which go to Muon, and learning rates worked out by hand."""

import math

import pytest
import torch

from training import PretrainConfig
from training.optimizer import FOUND_INF, LR_SCALE, build_optimizers, learning_rate, peak_rate, written


def groups(model, optimizer) -> list[tuple[float, set[str]]]:
    """(weight decay, names) of an optimizer's groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in optimizer.param_groups]


def expected_names(model) -> tuple[set[str], set[str], set[str]]:
    """(hidden matrices, head, the rest)."""
    names = {name for name, _ in model.named_parameters()}
    hidden = {name for name in names if "_proj.weight" in name}
    head = names & {"lm_head.weight"}
    return hidden, head, names - hidden - head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_matrices_decay_norms_and_embeddings_do_not(make_model, tied, qk_norm):
    model = make_model(tie_embeddings=tied, qk_norm=qk_norm)
    hidden, head, rest = expected_names(model)
    assert len(hidden) == 14 and all("norm" in name or "embed_tokens" in name for name in rest)
    (adamw,) = build_optimizers(model, PretrainConfig(optimizer="adamw", weight_decay=0.3))
    assert groups(model, adamw) == [(0.3, hidden | head), (0.0, rest)]
    assert all(g["betas"] == (0.9, 0.95) for g in adamw.param_groups)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_hidden_matrices_alone(make_model, tied):
    model = make_model(tie_embeddings=tied)
    hidden, head, rest = expected_names(model)
    muon, adamw = build_optimizers(model, PretrainConfig(optimizer="muon", weight_decay=0.3))
    looked_up = {"model.embed_tokens.weight"}
    assert groups(model, muon) == [(0.3, hidden)]
    assert groups(model, adamw) == ([] if tied else [(0.3, head)]) + [(0.0, looked_up), (0.0, rest - looked_up)]
    for each in (muon, adamw):
        scales = [10.0 if looked_up <= names else 1.0 for _, names in groups(model, each)]
        assert [group.get(LR_SCALE, 1.0) for group in each.param_groups] == scales


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_none_of_ours_is_learnt_by_adamw_without_decay(make_model, optimizer):
    model = make_model()
    hidden, _, rest = expected_names(model)
    model.scale = torch.nn.Parameter(torch.ones(3, 3))  # a matrix, which Muon would take if it went by shape
    model.model.extra = torch.nn.LayerNorm(32)
    rest |= {"scale", "model.extra.weight", "model.extra.bias"}
    *muon, adamw = build_optimizers(model, PretrainConfig(optimizer=optimizer, weight_decay=0.3))
    assert type(adamw) is torch.optim.AdamW
    looked_up = {"model.embed_tokens.weight"} if muon else set()  # a group of its own beside Muon
    assert groups(model, adamw) == [(0.0, looked_up) if muon else (0.3, hidden), (0.0, rest - looked_up)]
    before = model.scale.detach().clone()
    model.scale.sum().backward()
    for each in (*muon, adamw):
        each.step()
    assert (before - model.scale > 0).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_weight_is_left_alone(make_model, optimizer):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    every = [
        p
        for o in build_optimizers(model, PretrainConfig(optimizer=optimizer))
        for g in o.param_groups
        for p in g["params"]
    ]
    assert len(every) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_steps_learn_a_sequence(make_model, optimizer):
    model = make_model().train()
    ids = torch.tensor([[5, 9, 2, 40, 7, 11, 30, 60]])
    losses = []
    optimizers = build_optimizers(model, PretrainConfig(optimizer=optimizer, learning_rate=0.02))
    for _ in range(30):
        loss = model(ids, labels=ids.roll(-1, 1)).mean()
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def everything(optimizers) -> list[torch.Tensor]:
    """Weights, moments and counts as they are now."""
    return [tensor.detach().clone() for optimizer in optimizers for tensor in written(optimizer)]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize(("optimizer", "fused"), [("adamw", True), ("adamw", False), ("muon", True), ("muon", False)])
def test_an_update_that_is_not_finite_is_skipped_without_asking(make_model, optimizer, fused, bad):
    """The first, before there is any state, and one after others; those around it do not notice."""
    found = {}
    for skips in (False, True):
        model = make_model()
        optimizers = build_optimizers(model, PretrainConfig(optimizer=optimizer), fused=fused)
        for step in range(4):
            skipped = skips and step % 2 == 0
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if skipped:
                    parameter.grad.fill_(bad)
            before = everything(optimizers)
            for each in optimizers if skips or step % 2 else ():
                setattr(each, FOUND_INF, torch.tensor(float(skipped)))
                each.step()
            if skipped and step:
                assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizers), strict=True))
        found[skips] = everything(optimizers)
    assert len(found[True]) == len(found[False]) > len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))


def test_a_rate_that_nobody_gave_follows_optimizer_and_width():
    adamw, muon = (
        [peak_rate(PretrainConfig(dim=dim, optimizer=optimizer)) for dim in (256, 1024, None)]
        for optimizer in ("adamw", "muon")
    )
    assert adamw == pytest.approx([1.5e-3, 1.5e-3 / 4, 1.5e-3 / 2])
    assert muon == pytest.approx([5e-3, 5e-3 / 2, 5e-3 / 2**0.5])
    assert peak_rate(PretrainConfig(dim=128, learning_rate=1e-4)) == 1e-4


def rates(total: int, **settings) -> list[float]:
    config = PretrainConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_warm_up_then_cosine():
    found = rates(10, warmup_steps=2, min_lr=0.2)
    # after the warm-up, 8 steps of progress 0, 1/8 ... 7/8: 0.2 + 0.8 * (1 + cos(pi * progress)) / 2
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[4] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert found[6] == pytest.approx(0.6)
    assert found[8] == pytest.approx(0.2 + 0.4 * (1 - math.sqrt(0.5)))
    assert found == [*found[:2], *sorted(found[2:], reverse=True)] and min(found[2:]) > 0.2


def test_warm_up_then_stable_then_decay():
    found = rates(10, warmup_steps=2, min_lr=0.2, lr_schedule="wsd", decay_fraction=0.4)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_wsd_without_decay_stays_up():
    assert rates(6, warmup_steps=0, lr_schedule="wsd", decay_fraction=0.0) == [1.0] * 6


def test_defaults_end_at_a_tenth_and_warm_up_for_2_percent():
    found = rates(1000)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert found[20] == 1.0 > found[21]
    assert found[-1] == pytest.approx(0.1, abs=1e-5)
    assert learning_rate(199, 100_000, PretrainConfig(learning_rate=1.0)) == 1.0  # at most 200 steps
    assert learning_rate(198, 100_000, PretrainConfig(learning_rate=1.0)) == 199 / 200


def test_no_warm_up_and_one_step():
    assert rates(1, warmup_steps=0) == [1.0]
    assert rates(1) == [1.0]
    assert rates(2, warmup_steps=5) == pytest.approx([0.2, 0.4])
    config = PretrainConfig(learning_rate=1.0, warmup_steps=0, min_lr=0.25)
    assert learning_rate(12, 10, config) == 0.25  # past the plan it stays at the bottom
