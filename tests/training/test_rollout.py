"""Rollouts: who draws what, what it is worth, and that training reads the answers as they were drawn."""

import contextlib
import itertools
import math
from pathlib import Path

import pytest
import torch

from dataset import PROMPT, Loader, build_rows
from dataset.loader import PromptRows
from evaluation import Reward
from evaluation.rewards import RewardError
from model.adapters import LoRA, begun, switched_off
from model.folder import assemble
from tests.helpers import write_jsonl
from training import GRPO, GRPOConfig
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.groups import Answer, Group, Sampling, uniform
from training.rollout import Judged, Judging, Rollouts, judged_rollouts, lay_groups, pass_at, roll_out
from training.setup import Data, Start

HOW = Sampling(group_size=4, max_new_tokens=10, temperature=0.9, seed=3)
TEXTS = ["Hi", "What is 6 x 7?", "a b c d e f g", "Tell me more", "And then?", "你好", "Why?"]


@pytest.fixture
def rows(tmp_path: Path, tokenizer) -> PromptRows:
    data = [{"conversations": [{"role": "user", "content": text}], "answer": i} for i, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "prompts.jsonl", data)
    found = build_rows(PROMPT, str(path), tokenizer, 48, cache_dir=tmp_path / "cache")
    assert isinstance(found, PromptRows)
    return found


@pytest.fixture
def make_rollouts(rows, tokenizer, make_model):
    model = make_model(vocab_size=6400, qk_norm=True)
    engine = SingleEngine(model, GRPOConfig(), Machine(World(), torch.device("cpu"), torch.float32))
    start = make_model(seed=1, vocab_size=6400, qk_norm=True)

    def make(batch_size: int = 4, rank: int = 0, ranks: int = 1, how: Sampling = HOW, **judging) -> Judged:
        loader = Loader(rows, batch_size, rank=rank, world_size=ranks, rows_per_update=4, seed=5)
        reward = Reward(judging.pop("reward", ["length:30"]))
        judging = {"pass_reward": 1.0} | judging
        return Judged(loader, engine, tokenizer, how, Judging(reward, **judging), switched_to(start))

    return make


def switched_to(start):
    """The frozen model, whatever the network is by now."""
    return lambda network: contextlib.nullcontext(start)


def answers_by_row(batches) -> dict[int, list[float]]:
    """Row -> the log-probabilities of its answers' tokens, all answers one after another."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        for i, row in enumerate(batch.row_ids):
            mine = (batch.answer >= 4 * i) & (batch.answer < 4 * i + 4)
            found[row] = batch.drawn_at[mine].tolist()
    return found


def test_training_reads_the_answers_as_they_were_drawn(make_rollouts) -> None:
    """Every token's log-probability in training is that at which it was drawn, within 3e-5."""
    rollouts = make_rollouts()
    (batch,) = rollouts.update(0)
    assert batch.n_answers == 16 and batch.supervised == len(batch.drawn_at) == int(batch.lengths.sum()) > 60
    objective, engine = GRPO(temperature=HOW.temperature, parts=["length"]), rollouts.engine
    nll = engine.ask(batch, objective).nll
    gap = (-nll.flatten()[batch.learnt] - batch.drawn_at).abs().max()
    assert 0 < gap < 3e-5
    _, sums = objective(engine.ask(batch, objective), batch)
    logged = objective.metrics({name: float(value) for name, value in sums.items()}, objective.weight(batch))
    assert logged["logp_gap"] < 3e-5 and logged["kl"] > 0.01
    assert logged["length"] == batch.supervised / 16 and logged["reward"] == logged["length_reward"]


def test_answers_behind_one_prompt_are_those_of_the_single_sequences(make_rollouts, rows) -> None:
    """The layout beside its plain twin: each prompt and answer alone, without packing or branches; the start's, too."""
    rollouts = make_rollouts()
    groups = rollouts.answered([0, 1, 2], rollouts.engine.model)
    batch = rollouts.batch(groups, rollouts.engine.model)
    with rollouts.as_it_began(rollouts.engine.model) as start, torch.no_grad():
        for model, found in ((rollouts.engine.model, batch.drawn_at), (start, batch.reference)):
            single = []
            for prompt, answer in ((group.prompt, answer) for group in groups for answer in group.answers):
                logits = model(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 : -1]
                logps = (logits / HOW.temperature).log_softmax(-1)
                single.append(logps.gather(1, torch.tensor(answer.ids)[:, None])[:, 0])
            torch.testing.assert_close(found, torch.cat(single), atol=3e-5, rtol=0)
    prompts = sum(len(group.prompt) for group in groups)
    said = sum(len(answer.ids) for group in groups for answer in group.answers)
    assert batch.real_tokens == batch.input_ids.numel() == prompts + said - 3  # prompts once, and no padding


def test_who_draws_an_answer_does_not_matter(make_rollouts) -> None:
    whole = answers_by_row(make_rollouts().update(4))
    assert len(whole) == 3  # the data's end
    for split in ([make_rollouts(2)], [make_rollouts(2, rank, 2) for rank in (1, 0)], [make_rollouts(1)]):
        found = answers_by_row(batch for part in split for batch in part.update(4))
        assert found.keys() == whole.keys()
        for row, logps in whole.items():
            assert found[row] == pytest.approx(logps, abs=3e-5)
    again = answers_by_row(make_rollouts().update(4))
    assert again == whole
    other = answers_by_row(make_rollouts(how=HOW._replace(seed=4)).update(4))
    assert all(other[row] != whole[row] for row in whole)


def test_a_rank_without_prompts_has_a_batch_that_weighs_nothing(make_rollouts) -> None:
    rollouts = make_rollouts(2, rank=1, ranks=4)
    (batch,) = rollouts.update(4)
    assert batch.row_ids != []
    (empty,) = make_rollouts(2, rank=3, ranks=4).update(4)
    assert empty.supervised == empty.n_answers == empty.real_tokens == 0 and empty.input_ids.shape == (1, 1)
    for name in ("dapo", "gspo"):
        objective = GRPO(name, kl=0.1, parts=["length"])
        assert objective.weight(empty) == 0
        totals = rollouts.engine.forward_backward([empty], objective, 1.0).read()
        assert totals.sums["loss"] == 0 and totals.sums["groups"] == 0
        assert all(p.grad is None or not p.grad.any() for p in rollouts.engine.model.parameters())


def test_groups_without_variance_teach_nothing_and_may_be_left_out(make_rollouts) -> None:
    (batch,) = make_rollouts(reward=["length:1000"]).update(0)  # every answer is short enough
    assert not batch.advantages.any() and batch.supervised > 0
    objective, engine = GRPO(parts=["length"]), make_rollouts().engine
    engine.forward_backward([batch], objective)
    assert all(not p.grad.any() for p in engine.model.parameters())
    for parameter in engine.model.parameters():
        parameter.grad = None
    (left,) = make_rollouts(reward=["length:1000"], filter_groups=True).update(0)
    assert left.supervised == 0 and left.tallies[:9].tolist() == batch.tallies[:9].tolist()
    (mixed,) = make_rollouts(filter_groups=True).update(0)
    assert mixed.n_answers % 4 == 0 and bool(mixed.advantages.view(-1).any())


def test_advantages_and_tallies_follow_from_the_rewards(make_rollouts) -> None:
    rollouts = make_rollouts(reward=["length:12"], overlong_buffer=9)
    groups = rollouts.answered([0, 1, 2, 3], rollouts.engine.model)
    rewards, tallies = rollouts.judge(groups)
    counted = dict(zip(GRPO(parts=["length"]).tallies, tallies.tolist(), strict=True))
    expected = [
        max(0.0, min(1.0, 2 - len(a.text) / 12)) + min(0.0, (1 - len(a.ids)) / 9) for g in groups for a in g.answers
    ]
    assert rewards.flatten().tolist() == pytest.approx(expected)
    assert counted["answers"] == 16 and counted["groups"] == 4 and counted["reward"] == pytest.approx(sum(expected))
    assert counted["distinct"] == sum(len({tuple(a.ids) for a in g.answers}) for g in groups)
    assert counted["truncated"] == sum(
        len(a.ids) == 10 and a.finish_reason == "length" for g in groups for a in g.answers
    )
    passed = [sum(len(a.text) <= 12 for a in g.answers) for g in groups]  # without the penalty
    assert counted["pass_at_1"] == pytest.approx(sum(passed) / 4) and math.isnan(counted["pass_at_8"])
    batch = rollouts.batch(groups, rollouts.engine.model)
    by_answer = torch.tensor([float(batch.advantages[batch.answer == i][0]) for i in range(16)]).view(4, 4)
    torch.testing.assert_close(by_answer, (rewards - rewards.mean(1, keepdim=True)).float())
    prompt, said = rollouts.samples() or ("", "")
    assert prompt == groups[0].row["conversations"][0]["content"] and f"{max(rewards[0]):.3f}" in said


def test_what_a_tool_said_is_read_and_not_learnt(tokenizer, make_model) -> None:
    """Turns that were not drawn stand in the sequence without labels, and later turns see them."""
    model = make_model(vocab_size=6400)
    answers = [
        Answer([8, 9, 30, 31, 12, 2], [True, True, False, False, True, True], [0.0] * 4, 0.0, "stop", ""),
        Answer([8, 2], [True, True], [0.0] * 2, 0.0, "stop", ""),
    ]
    laid = lay_groups([Group(0, 0, [5, 6, 7], {}, "", answers)], pad_id=3)
    labels = laid["labels"][0]
    assert labels.tolist() == [-100, -100, 8, 9, -100, -100, 12, 2, 8, 2]
    assert laid["input_ids"][0].tolist() == [5, 6, 7, 8, 9, 30, 31, 12, 7, 8] and laid["supervised"] == 6
    nll = model(laid["input_ids"], laid["position_ids"], laid["labels"])[0]
    whole = torch.tensor([[5, 6, 7, 8, 9, 30, 31, 12]])
    alone = model(whole, labels=torch.tensor([[-100, -100, 8, 9, -100, -100, 12, 2]]))[0]
    torch.testing.assert_close(nll[:8], alone)


def test_pass_at_k_is_the_chance_that_one_of_k_passes() -> None:
    for n, c, k in itertools.product((8, 11), range(9), (1, 3, 8)):
        tries = list(itertools.combinations(range(n), k))
        assert pass_at(k, c, n) == pytest.approx(sum(any(i < c for i in each) for each in tries) / len(tries))
    assert math.isnan(pass_at(8, 3, 4))


def test_an_adapter_switched_off_leaves_the_model_it_stands_on(make_model) -> None:
    model, ids = make_model(vocab_size=97), torch.tensor([[5, 9, 2, 40]])
    lora = LoRA(rank=4, dora=True, tokens=(2, 9))
    weights = dict(begun(((n, p.detach()) for n, p in model.named_parameters()), lora, seed=1))
    adapted = assemble(model.config, weights.items(), adapter=lora)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert (adapted(ids) - model(ids)).abs().max() > 0.1
    before = adapted(ids)
    with switched_off(adapted) as without:
        torch.testing.assert_close(without(ids), model(ids))
    torch.testing.assert_close(adapted(ids), before)


def test_a_reward_that_fails_names_the_row(make_rollouts, rows, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def bad(messages, answer, row):\n    return row['missing']\n")
    with pytest.raises(RewardError, match=r"prompts.jsonl:[1-7]: reward .*own.py:bad: KeyError: 'missing'"):
        make_rollouts(reward=[f"{tmp_path}/own.py:bad"]).update(0)


def test_plain_rollouts_are_batches_of_labelled_answers(make_rollouts, tokenizer) -> None:
    """What a teacher would be asked about: the same answers, without rewards."""
    judged = make_rollouts()
    plain = Rollouts(judged.loader, judged.engine, tokenizer, HOW)
    (batch,), (other,) = plain.update(0), judged.update(0)
    assert torch.equal(batch.labels, other.labels) and torch.equal(batch.position_ids, other.position_ids)
    assert plain.rows_per_update == 4 and plain.rows_per_epoch == 7 and not plain.ahead


def test_held_out_answers_are_drawn_by_numbers_of_their_own(make_rollouts, rows, tokenizer) -> None:
    """Those of training would flatter: what was right by them has become likelier by them."""
    rollouts = make_rollouts()
    config = GRPOConfig(reward=["length:30"], group_size=4, max_new_tokens=10, seed=3)
    start = Start(rollouts.engine.model, rollouts.engine.model.named_parameters, tokenizer, config, 48)
    sources = judged_rollouts(Data(rollouts.loader, rollouts.loader), rollouts.engine, start)
    assert sources.val is not None and sources.val.how.group_size == 8
    train, val = (uniform(source.how, 0, 0) for source in (sources.train, sources.val))
    assert not torch.equal(train, val) and torch.equal(val, uniform(sources.val.how, 0, 0))


def test_no_prompt_gives_no_answer(tokenizer, make_model) -> None:
    assert roll_out(make_model(), tokenizer, [], [], HOW) == []
