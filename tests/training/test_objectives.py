"""Sums and weights of the objectives, and DPO against its paper written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

from dataset.batch import IGNORE, Batch
from dataset.loader import EMPTY_ROW, PairRows, TextRows
from tests.conftest import encoded
from training import DPO, STAGES, DPOConfig, NextToken, load_config
from training.objectives import Output, answer_logps

DOCUMENTS = [[1, 21, 22, 23, 2], [1, 31, 2], [1, 41, 42, 43, 44, 45, 46, 2]]
PROMPT = [1, 5, 6]
CHOSEN = [[20, 8], [40, 41, 42, 8], [51, 8], [60]]
REJECTED = [[30, 31, 8], [50, 8], [52, 53, 8], [61, 62, 8]]
REFERENCE = torch.tensor([[-9.0, -20.0], [-30.0, -11.0], [-12.5, -21.0], [-4.0, -15.0]])


def pair_rows() -> PairRows:
    columns = {
        "chosen": [PROMPT + a for a in CHOSEN],
        "rejected": [PROMPT + a for a in REJECTED],
        "prompt": [3] * 4,
    }
    rows = PairRows(encoded(**columns), max_seq_len=12, pad_id=3)
    rows.reference = REFERENCE.numpy()
    return rows


def ask(model, batch: Batch) -> Output:
    return Output(nll=model(batch.input_ids, batch.position_ids, batch.labels))


def answer_logp(model, answer: list[int]) -> torch.Tensor:
    """log p(answer | prompt), nats, a token at a time, unpacked."""
    ids = PROMPT + answer
    logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum((logp[place - 1, ids[place]] for place in range(len(PROMPT), len(ids))), torch.tensor(0.0))


def gradient(loss: torch.Tensor, model) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_next_token_is_a_sum_over_supervised_tokens(make_model):
    model = make_model()
    rows = TextRows(encoded(ids=DOCUMENTS), 9, 3)  # 7 + 2 and 4 places: no document is cut
    batch = rows.collate([0, 1, EMPTY_ROW])
    sizes = torch.arange(97)  # pretend that token i stands for i bytes
    objective = NextToken(sizes)
    loss, sums = objective(ask(model, batch), batch)
    plain = sum(
        F.cross_entropy(model(torch.tensor([d[:-1]]))[0], torch.tensor(d[1:]), reduction="sum") for d in DOCUMENTS
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert sums["loss"].item() == loss.item() and not sums["loss"].requires_grad
    assert objective.weight(batch) == 13
    assert sums["bytes"].item() == sum(sum(d[1:]) for d in DOCUMENTS)


def test_means_and_bits_per_byte_are_taken_once():
    metrics = NextToken(torch.ones(3)).metrics({"loss": 8.0, "bytes": 16.0}, 4.0)
    assert metrics == {"loss": 2.0, "bpb": pytest.approx(0.5 / math.log(2))}
    assert NextToken().metrics({"loss": 8.0}, 4.0) == {"loss": 2.0}


def test_an_update_of_padding_alone_is_nothing(make_model):
    model = make_model()
    batch = TextRows(encoded(ids=DOCUMENTS), 10, 3).collate([EMPTY_ROW])
    loss, sums = NextToken(torch.ones(97))(ask(model, batch), batch)
    assert loss.item() == 0 and NextToken().weight(batch) == 0
    assert not gradient(loss, model).any()
    assert NextToken(torch.ones(97)).metrics({k: float(v) for k, v in sums.items()}, 0.0) == {"loss": 0.0}
    pairs = pair_rows().collate([EMPTY_ROW])
    loss, _ = DPO()(ask(model, pairs), pairs)
    assert loss.item() == 0 and DPO().weight(pairs) == 0
    assert not gradient(loss, model).any()


def test_bytes_are_counted_for_supervised_labels_alone(make_model):
    batch = Batch.of(torch.tensor([[1, 2, 3]]), torch.tensor([[5, IGNORE, 7]]), torch.tensor([[0, 1, 2]]), [0], 3)
    assert NextToken(torch.arange(97) + 100)(ask(make_model(), batch), batch)[1]["bytes"].item() == 105 + 107


def test_log_probabilities_of_packed_answers_are_those_of_the_answers_alone(make_model):
    model = make_model()
    rows = pair_rows()
    assert len(rows) == 2  # 9 + 10 + 9 + 8 places, rows of 24: answers share rows
    batch = rows.collate([1, EMPTY_ROW, 0])
    with torch.no_grad():
        expected = [[float(answer_logp(model, answers[i])) for answers in (CHOSEN, REJECTED)] for i in batch.pair_ids]
        torch.testing.assert_close(answer_logps(ask(model, batch), batch), torch.tensor(expected), atol=1e-4, rtol=1e-6)
    assert sorted(batch.pair_ids) == [0, 1, 2, 3]


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_is_equation_7_of_its_paper_and_its_gradient(make_model, beta):
    """Rafailov et al. 2023, section 4: the loss, and the gradient as the paper writes it out:

    grad = -beta * sum over pairs of sigmoid(r(rejected) - r(chosen)) * (grad log p(chosen) - grad log p(rejected))
    """
    model = make_model()
    batch = pair_rows().collate([0, 1])
    loss, sums = DPO(beta)(ask(model, batch), batch)
    chosen = torch.stack([answer_logp(model, CHOSEN[i]) for i in range(4)])
    rejected = torch.stack([answer_logp(model, REJECTED[i]) for i in range(4)])
    reward = {
        "chosen": [beta * (chosen[i].item() - REFERENCE[i, 0].item()) for i in range(4)],
        "rejected": [beta * (rejected[i].item() - REFERENCE[i, 1].item()) for i in range(4)],
    }
    margins = [a - b for a, b in zip(reward["chosen"], reward["rejected"], strict=True)]
    expected_loss = sum(math.log1p(math.exp(-m)) if m > 0 else -m + math.log1p(math.exp(m)) for m in margins)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)

    weights = torch.tensor([1 / (1 + math.exp(m)) for m in margins], dtype=torch.float64)
    expected = gradient((-beta * weights * (chosen - rejected)).sum(), model)
    assert relative(gradient(loss, model), expected) < 1e-5

    metrics = DPO(beta).metrics({name: float(value) for name, value in sums.items()}, 4.0)
    assert tuple(sums) == DPO.names
    assert metrics["loss"] == pytest.approx(expected_loss / 4, rel=1e-5)
    assert metrics["chosen_reward"] == pytest.approx(sum(reward["chosen"]) / 4, rel=1e-4)
    assert metrics["rejected_reward"] == pytest.approx(sum(reward["rejected"]) / 4, rel=1e-4)
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / 4, rel=1e-4)
    assert metrics["reward_accuracy"] == sum(m > 0 for m in margins) / 4
    assert metrics["drift"] == pytest.approx((chosen - REFERENCE[:, 0]).mean().item(), rel=1e-4)


def test_the_chosen_answers_likelihood_is_added_a_pair_at_a_time(make_model):
    """nll_weight * the mean over the chosen answer's tokens: a short answer counts as much as a long one."""
    model = make_model()
    batch = pair_rows().collate([0, 1])
    plain, _ = DPO(0.1)(ask(model, batch), batch)
    loss, sums = DPO(0.1, nll_weight=2.5)(ask(model, batch), batch)
    nll = sum(-answer_logp(model, CHOSEN[i]) / len(CHOSEN[i]) for i in range(4))
    assert loss.item() == pytest.approx(plain.item() + 2.5 * nll.item(), rel=1e-5)
    assert sums["chosen_nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    expected = gradient(plain, model) + 2.5 * gradient(nll, model)
    assert relative(gradient(DPO(0.1, nll_weight=2.5)(ask(model, batch), batch)[0], model), expected) < 1e-5


def test_dpo_starts_at_log_2(make_model):
    model = make_model()
    batch = pair_rows().collate([0, 1])
    batch.reference = answer_logps(ask(model, batch), batch).detach()
    _, sums = DPO()(ask(model, batch), batch)
    assert sums["loss"].item() == pytest.approx(4 * math.log(2))
    assert sums["chosen_reward"].item() == sums["rejected_reward"].item() == sums["reward_accuracy"].item() == 0


def test_how_pairs_are_batched_does_not_matter(make_model):
    model = make_model()
    rows = pair_rows()

    def dpo(batch) -> torch.Tensor:
        return DPO()(ask(model, batch), batch)[0]

    together = dpo(rows.collate([0, 1]))
    apart = dpo(rows.collate([1])) + dpo(rows.collate([0]))
    assert relative(gradient(apart, model), gradient(together, model)) < 1e-5


HEALTHY = {"step": 40, "loss": 0.4, "lr": 1e-5, "reward_margin": 0.6, "reward_accuracy": 0.9, "drift": -3.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"reward_margin": -5e-4, "loss": 0.69, "reward_accuracy": 0.5}, ["reward_margin is -5.0e-04 at step 40"]),
        ({"reward_margin": -5e-4, "lr": 0.0}, []),  # nothing was meant to move
        ({"reward_margin": -0.5}, []),  # wrong, but it moves
        (
            {"reward_margin": 9.0, "reward_accuracy": 1.0, "loss": 0.002},
            ["loss 0.0020 with every pair right at step 40"],
        ),
        ({"reward_margin": 9.0, "reward_accuracy": 1.0, "loss": 0.02}, []),
        ({"reward_margin": 9.0, "reward_accuracy": 0.99, "loss": 0.002}, []),
        ({"drift": -81.4}, []),  # says nothing by itself: what becomes of answers is measured
        (
            {"reward_margin": 9.0, "reward_accuracy": 1.0, "loss": 0.002, "drift": -81.4},
            ["saturated; lower --learning_rate or --epochs"],
        ),
    ],
)
def test_preference_training_that_does_nothing_or_too_much_is_told_from_step_20_on(changes, said):
    found = DPO().warnings(HEALTHY | changes)
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))
    assert len(DPO().warnings(HEALTHY | changes | {"step": 20})) == len(said)
    assert DPO().warnings(HEALTHY | changes | {"step": 19}) == []


def test_warnings_need_nothing_but_what_a_record_of_training_has(make_model):
    batch = pair_rows().collate([0, 1])
    _, sums = DPO()(ask(make_model(), batch), batch)
    record = DPO().metrics({name: float(value) for name, value in sums.items()}, 4.0) | {"step": 20, "lr": 1e-5}
    DPO().warnings(record)
    assert NextToken().warnings({"step": 20, "loss": 1.0}) == []


def test_a_loss_that_is_not_known_is_refused():
    with pytest.raises(KeyError, match="hinges"):
        DPO(loss_type="hinges")
    with pytest.raises(ValueError, match="--loss_type is 'hinges'; it must be one of sigmoid.*did you mean hinge"):
        load_config(DPOConfig, ["--loss_type", "hinges"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_made_of_a_form_and_an_objective_that_fit_its_config(stage):
    made = STAGES[stage]
    assert made.config.stage == stage and made.form.stage == {"distill": "full_sft", "ppo": "grpo"}.get(stage, stage)
    objective = made.objective(load_config(made.config, []))
    assert objective.names[0] == "loss" and objective.unit == ("pairs" if stage in ("dpo", "reward") else "")


def test_dpo_is_made_with_the_beta_of_its_config():
    assert STAGES["dpo"].objective(load_config(DPOConfig, ["--beta", "0.5"])).loss.beta == 0.5
