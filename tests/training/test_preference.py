"""Every preference loss against its paper, written out in plain numbers; what they share; labelled answers."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from dataset import LABELLED, build_rows
from dataset.batch import PairBatch
from dataset.encode import Rules, encode_files
from dataset.loader import EMPTY_ROW, LabelledRows, PairRows
from dataset.records import DataError
from tests.conftest import encoded
from tests.helpers import write_jsonl
from tests.training.test_objectives import CHOSEN, REFERENCE, REJECTED, answer_logp, ask, gradient, pair_rows, relative
from training import STAGES, DPOConfig, load_config
from training.objectives import DPO, KTO, preference
from training.preference import LOSSES, Answers, own_flags

# log-probabilities of chosen and rejected, the reference's, tokens of each
PAIRS = [
    (-12.0, -15.5, -13.0, -14.0, 4, 7),
    (-30.25, -8.0, -24.0, -9.5, 11, 2),
    (-3.0, -3.5, -3.0, -3.5, 3, 3),
    (-18.0, -31.5, -25.0, -25.0, 6, 20),
]
KL = 0.75


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


def dpo(beta: float, w: float, v: float, rw: float, rv: float) -> float:
    """The margin of the rewards that DPO reads off: beta * log of the ratio of ratios."""
    return beta * math.log((math.exp(w) / math.exp(rw)) / (math.exp(v) / math.exp(rv)))


# As the papers write them, for one pair: w and v are log pi of the chosen and the rejected answer, rw and rv log ref,
# nw and nv their lengths.
PAPERS = {
    "sigmoid": lambda w, v, rw, rv, nw, nv: -math.log(sigma(dpo(0.3, w, v, rw, rv))),
    "cdpo": lambda w, v, rw, rv, nw, nv: (
        -0.8 * math.log(sigma(dpo(0.3, w, v, rw, rv))) - 0.2 * math.log(1 - sigma(dpo(0.3, w, v, rw, rv)))
    ),
    "robust": lambda w, v, rw, rv, nw, nv: (
        (0.8 * -math.log(sigma(dpo(0.3, w, v, rw, rv))) - 0.2 * -math.log(sigma(dpo(0.3, v, w, rv, rw)))) / 0.6
    ),
    "hinge": lambda w, v, rw, rv, nw, nv: max(0.0, 1 - dpo(0.3, w, v, rw, rv)),
    "ipo": lambda w, v, rw, rv, nw, nv: ((w - rw) / nw - (v - rv) / nv - 1 / (2 * 0.3)) ** 2,
    "exo": lambda w, v, rw, rv, nw, nv: sum(
        p * math.log(p / label)
        for p, label in ((sigma(dpo(0.3, w, v, rw, rv)), 0.8), (sigma(dpo(0.3, v, w, rv, rw)), 0.2))
    ),
    "apo_zero": lambda w, v, rw, rv, nw, nv: 1 - sigma(0.3 * (w - rw)) + sigma(0.3 * (v - rv)),
    "apo_down": lambda w, v, rw, rv, nw, nv: sigma(0.3 * (w - rw)) + 1 - sigma(dpo(0.3, w, v, rw, rv)),
    "kto": lambda w, v, rw, rv, nw, nv: (
        1.5 * (1 - sigma(0.3 * (w - rw - KL))) + 0.5 * (1 - sigma(0.3 * (KL - (v - rv))))
    ),
    "simpo": lambda w, v, rw, rv, nw, nv: -math.log(sigma(2.5 / nw * w - 2.5 / nv * v - 0.7)),
    "orpo": lambda w, v, rw, rv, nw, nv: -w / nw - 0.2 * math.log(sigma(math.log(odds(w / nw) / odds(v / nv)))),
}
FLAGS = {
    "simpo": {"beta": 2.5, "simpo_gamma": 0.7},
    "orpo": {"orpo_lambda": 0.2},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
} | {name: {"beta": 0.3, "label_smoothing": 0.2} for name in ("robust", "cdpo", "exo")}


def loss_of(name: str):
    return LOSSES[name](**FLAGS.get(name, {"beta": 0.3}))


def answers(pairs: list, reference: bool = True) -> Answers:
    table = torch.tensor(pairs, dtype=torch.float64)
    return Answers(table[:, :2], table[:, 2:4] if reference else table[:, :0], table[:, 4:], KL)


def test_every_loss_has_a_formula_here_and_a_name_for_the_command_line():
    assert PAPERS.keys() | {"apo"} == LOSSES.keys() == set(get_args(get_type_hints(DPOConfig)["loss_type"]))
    assert LOSSES["apo"] is LOSSES["apo_zero"]


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_and_its_gradient_are_those_of_its_paper(name):
    loss = loss_of(name)
    given = answers(PAIRS, loss.reference)  # a loss without a reference is given none
    logps = given.logps.requires_grad_()
    found = loss(loss.rewards(given), given)
    expected = [PAPERS[name](*pair) for pair in PAIRS]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    (slopes,) = torch.autograd.grad(found.sum(), logps)
    for pair, slope in zip(PAIRS, slopes, strict=True):
        for side in (0, 1):
            step = np.eye(6)[side] * 1e-4
            up, down = (PAPERS[name](*(np.array(pair) + way * step)) for way in (1, -1))
            assert slope[side].item() == pytest.approx((up - down) / 2e-4, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_stays_finite_far_from_where_it_starts(name):
    loss = loss_of(name)
    far = answers(
        [(-5.0, -900.0, -905.0, -3.0, 5, 9), (-900.0, -5.0, -3.0, -905.0, 9, 5), (0.0, -9.0, -1.0, -1.0, 1, 1)]
    )
    far = far._replace(logps=far.logps.float().requires_grad_(), reference=far.reference.float())
    found = loss(loss.rewards(far), far)
    assert found.isfinite().all() and torch.autograd.grad(found.sum(), far.logps)[0].isfinite().all()


@pytest.mark.parametrize("name", PAPERS)
def test_more_likely_chosen_answers_are_more_right(name):
    loss = loss_of(name)
    given = answers([(-5.0, -50.0, -20.0, -20.0, 5, 5), (-50.0, -5.0, -20.0, -20.0, 5, 5)])
    rewards = loss.rewards(given)
    assert loss.right(rewards, given).tolist() == [2 if loss.single else 1, 0]


@pytest.mark.parametrize("name", ["simpo", "orpo", "ipo", "sigmoid"])
def test_an_objective_gives_its_loss_what_the_network_said(make_model, name):
    """Lengths, sums and the reference of packed pairs; rewards, and drift where there is a start to measure from."""
    model, rows = make_model(), pair_rows()
    objective = DPO(loss_type=name, nll_weight=0.5, **FLAGS.get(name, {"beta": 0.3}))
    if not objective.loss.reference:
        rows.reference = np.zeros((4, 0), dtype=np.float32)
    batch = rows.collate([0, EMPTY_ROW, 1])
    loss, sums = objective(ask(model, batch), batch)
    logps = [[answer_logp(model, side[i]).item() for side in (CHOSEN, REJECTED)] for i in range(4)]
    expected = sum(
        PAPERS[name](*logps[i], *REFERENCE[i].tolist(), len(CHOSEN[i]), len(REJECTED[i]))
        - 0.5 * logps[i][0] / len(CHOSEN[i])
        for i in range(4)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    metrics = objective.metrics({key: float(value) for key, value in sums.items()}, 4.0)
    assert ("drift" in metrics) == objective.loss.reference
    if name == "simpo":
        rewards = [2.5 * logps[i][0] / len(CHOSEN[i]) for i in range(4)]
        assert metrics["chosen_reward"] == pytest.approx(sum(rewards) / 4, rel=1e-4)
    if name == "orpo":
        log_odds = [math.log(odds(logps[i][1] / len(REJECTED[i]))) for i in range(4)]
        assert metrics["rejected_reward"] == pytest.approx(sum(log_odds) / 4, rel=1e-4)


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_what_nobody_gave_has_the_losss_own_default(name):
    config = load_config(DPOConfig, ["--loss_type", name])
    given = {flag: getattr(config, flag) for flag in ("beta", "label_smoothing", "simpo_gamma", "orpo_lambda")}
    assert {flag: value for flag, value in given.items() if value is not None}.items() <= own_flags(name).items()
    assert vars(preference(config).loss) == own_flags(name)
    assert preference(config).unit == ("answers" if name == "kto" else "pairs")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--label_smoothing 0.1", "--loss_type sigmoid does not read it; .* a loss that does: robust, cdpo, exo"),
        ("--loss_type orpo --beta 0.2", "--beta is 0.2, and --loss_type orpo does not read it"),
        ("--loss_type ipo --simpo_gamma 1", "a loss that does: simpo"),
        ("--loss_type robust --label_smoothing 0.5", "less than 0.5"),
        ("--loss_type exo --label_smoothing 0", "more than 0"),
        ("--loss_type apozero", "did you mean apo_zero"),
    ],
)
def test_a_flag_that_a_loss_does_not_read_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        load_config(DPOConfig, flags.split())


def test_a_flag_is_read_by_the_loss_it_is_for():
    assert (
        preference(load_config(DPOConfig, ["--loss_type", "cdpo", "--label_smoothing", "0.3"])).loss.label_smoothing
        == 0.3
    )
    assert preference(load_config(DPOConfig, ["--loss_type", "orpo", "--beta", "none"])).loss == LOSSES["orpo"]()


# Labelled answers ----------------------------------------------------------------------------------------------------

QUESTION, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Yes."), ("assistant", "no"))
)
ROWS = [
    {"conversations": [QUESTION, GOOD], "label": True},
    {"conversations": [QUESTION, BAD], "label": False},
    {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
]


def test_a_labelled_answer_is_a_pair_that_lacks_the_other(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    found = encode_files([str(path)], tokenizer, Rules(LABELLED, 64), tmp_path).columns.to_pylist()
    good, bad, both = ({key: row[key] for key in ("chosen", "rejected", "prompt")} for row in found)
    prompt = both["chosen"][: both["prompt"]]
    assert good == both | {"rejected": prompt} and bad == both | {"chosen": prompt}
    rows = build_rows(LABELLED, str(path), tokenizer, 64, cache_dir=tmp_path)
    assert isinstance(rows, LabelledRows)
    rows.reference = np.zeros((3, 2), dtype=np.float32)
    batch = rows.collate([0, EMPTY_ROW])
    assert batch.n_pairs == 3 and batch.n_answers == 4
    assert KTO(loss_type="kto").weight(batch) == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [QUESTION, GOOD], "label": 1}, "found a number as label, expected true"),
        ({"conversations": [QUESTION], "label": True}, "found a last message of role 'user'"),
        ({"conversations": [GOOD], "label": True}, "found no message before the answer"),
        ({"conversations": [QUESTION, GOOD]}, "found the keys 'conversations': .* train_full_sft"),
        ({"chosen": [QUESTION, GOOD], "rejected": [GOOD]}, "different prompts"),
    ],
)
def test_a_row_that_is_no_labelled_answer_is_refused_by_its_line(tmp_path, tokenizer, row, said):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{said}"):
        build_rows(LABELLED, str(path), tokenizer, 64, cache_dir=tmp_path)


def test_other_losses_refuse_a_labelled_answer_and_say_which_takes_it(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    form = STAGES["dpo"].form_for(load_config(DPOConfig, []))
    with pytest.raises(DataError, match="--loss_type kto learns from"):
        build_rows(form, str(path), tokenizer, 64, cache_dir=tmp_path)
    assert STAGES["dpo"].form_for(load_config(DPOConfig, ["--loss_type", "kto"])) is LABELLED


PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10], [1, 11, 12]]
ANSWERS = [([20, 2], [21, 22, 2]), ([23, 2], []), ([], [24, 25, 26, 2]), ([27, 28, 2], [29, 2])]


def labelled_rows(cls=LabelledRows, max_seq_len: int = 8) -> PairRows:
    columns = {
        name: [p + a[side] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        for side, name in enumerate(("chosen", "rejected"))
    }
    return cls(encoded(**columns, prompt=[len(p) for p in PROMPTS]), max_seq_len=max_seq_len, pad_id=3)


def learnt(batch: PairBatch) -> dict[tuple[int, int], list[int]]:
    """(pair, side) -> the labels of its answer."""
    found: dict[tuple[int, int], list[int]] = {}
    for segment, label in zip(batch.segment.flatten().tolist(), batch.labels.flatten().tolist(), strict=True):
        if segment >= 0:
            found.setdefault((batch.pair_ids[segment // 2], segment % 2), []).append(label)
    return found


def test_mismatched_answers_are_all_answers_behind_other_prompts():
    rows = labelled_rows()
    for each in (rows, rows.beside):
        each.reference = np.zeros((4, 2), dtype=np.float32)
    numbers = list(range(len(rows)))
    assert len(rows) == len(rows.beside)
    own, other = learnt(rows.collate(numbers)), learnt(rows.beside.collate(numbers))
    assert own == {(i, side): a[side] for i, a in enumerate(ANSWERS) for side in (0, 1) if a[side]}
    assert other == {
        (i, side): ANSWERS[(i + 2) % 4][side] for i in range(4) for side in (0, 1) if ANSWERS[(i + 2) % 4][side]
    }
    for number in numbers:  # a row holds the same prompts in both
        assert rows.collate([number]).pair_ids == rows.beside.collate([number]).pair_ids


def test_mismatched_answers_are_cut_like_any():
    rows = labelled_rows(max_seq_len=6)
    rows.beside.reference = np.zeros((4, 2), dtype=np.float32)
    found = learnt(rows.beside.collate(list(range(len(rows)))))
    assert found[(2, 1)] == ANSWERS[0][1] and found[(0, 1)] == ANSWERS[2][1]  # 4 + 3 and 3 + 4 tokens: 7 = limit
    assert max(len(rows.beside.sides[side][i]) for side in (0, 1) for i in range(4)) <= 7


def test_kto_of_a_batch_is_the_papers_sum_over_its_answers(make_model):
    """z0 from the mismatched answers, each asked about alone; labelled answers and pairs in one batch."""
    model, rows = make_model(), labelled_rows()
    rng = np.random.default_rng(0)
    there = np.array(
        [[bool(answer) for answer in pair] for pair in ANSWERS]
    )  # nothing is said of an answer that is not
    rows.reference = np.where(there, rng.normal(-12, 1, (4, 2)), 0).astype(np.float32)
    rows.beside.reference = np.where(np.roll(there, 2, 0), rng.normal(-12, 1, (4, 2)), 0).astype(np.float32)
    numbers = [*range(len(rows)), EMPTY_ROW]

    def logp(prompt: list[int], answer: list[int]) -> float:
        ids = prompt + answer
        said = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        return sum(said[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))

    present = [(i, side) for i in range(4) for side in (0, 1) if ANSWERS[i][side]]
    swapped = [(i, side) for i in range(4) for side in (0, 1) if ANSWERS[(i + 2) % 4][side]]
    ratios = [
        logp(PROMPTS[i], ANSWERS[(i + 2) % 4][side]) - float(rows.beside.reference[i, side]) for i, side in swapped
    ]
    objective = KTO(loss_type="kto", **FLAGS["kto"])
    batch, beside = rows.collate(numbers), rows.beside.collate(numbers)

    def measured(shift: float):
        found = rows.beside.collate(numbers)
        found.reference = found.reference + shift * (found.reference != 0)
        _, sums = objective(ask(model, found), found)
        return objective.informed(lambda: ({k: float(v) for k, v in sums.items()}, float(objective.weight(found))))

    assert objective.weight(beside) == len(swapped) == 6
    mean = sum(ratios) / len(ratios)
    for shift in (0.0, 50.0 * np.sign(mean)):  # once as it is, once where the mean has the other sign
        told = measured(float(shift))
        z0 = max(0.0, mean - shift)
        assert told.kl == pytest.approx(z0, abs=1e-4) and objective.kl == 0
        loss, sums = told(ask(model, batch), batch)
        expected, right = 0.0, 0
        for i, side in present:
            over = 0.3 * (logp(PROMPTS[i], ANSWERS[i][side]) - float(rows.reference[i, side]) - z0)
            expected += 1.5 * (1 - sigma(over)) if side == 0 else 0.5 * (1 - sigma(-over))
            right += over > 0 if side == 0 else over < 0
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        metrics = told.metrics({key: float(value) for key, value in sums.items()}, 6.0)
        assert metrics["loss"] == pytest.approx(expected / 6, rel=1e-4)
        assert metrics["kl"] == pytest.approx(z0, abs=1e-4) and metrics["reward_accuracy"] == right / 6
        chosen = [logp(PROMPTS[i], ANSWERS[i][0]) for i, side in present if side == 0]
        assert metrics["chosen_logp"] == pytest.approx(sum(chosen) / 3, rel=1e-4)
        # the KL term has no gradient, and how rows are batched does not matter to what is learnt
        parts = [told(ask(model, b), b)[0] for b in (rows.collate([n]) for n in range(len(rows)))]
        assert relative(gradient(sum(parts), model), gradient(loss, model)) < 1e-5


def test_what_no_answer_says_is_no_number():
    objective = KTO(loss_type="kto")
    sums = dict.fromkeys(objective.names, 2.0) | {"rejected_reward": 0.0, "rejected_logp": 0.0, "chosen_answers": 4.0}
    metrics = objective.metrics(sums, 4.0)
    assert metrics["chosen_reward"] == metrics["loss"] == 0.5 and "chosen_answers" not in metrics
    assert all(math.isnan(metrics[name]) for name in ("rejected_reward", "rejected_logp", "reward_margin"))
