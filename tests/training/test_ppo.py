"""PPO: advantages and the critic's loss in plain numbers; values stand where tokens are drawn; how a critic starts."""

import itertools
import math

import pytest
import torch

from model import GPT, load_pretrained
from tests.helpers import metrics, stage_flags, train_here, train_start
from training import PPOConfig, load_config
from training.critic import clipped_value_loss, gae
from training.engines.actor_critic import ActorCritic
from training.objectives import Critic, Output, ppo_of

REWARDS = [1.0, -0.5, 2.0]
VALUES = [[0.2, 0.5, 0.4, 0.8], [0.3], [-0.1, 0.9]]


def plain_gae(reward: float, values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 of the paper as it stands: a sum of discounted residuals, from every token to the end."""
    n = len(values)
    rewards = [0.0] * (n - 1) + [reward]
    after = [*values[1:], 0.0]
    residuals = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * residuals[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.8, 1.0)])
def test_advantages_are_the_papers_sums(gamma, lam):
    values = torch.tensor([v for each in VALUES for v in each])
    lengths = torch.tensor([len(each) for each in VALUES])
    advantages, returns = gae(torch.tensor(REWARDS, dtype=torch.float64), values, lengths, gamma, lam)
    expected = [a for r, v in zip(REWARDS, VALUES, strict=True) for a in plain_gae(r, v, gamma, lam)]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-7)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values.tolist(), strict=True)], abs=1e-7)
    if (gamma, lam) == (1.0, 1.0):  # what came of it, less what was expected
        assert advantages[:4].tolist() == pytest.approx([1 - v for v in VALUES[0]], abs=1e-7)


def test_no_answers_have_no_advantages():
    found = gae(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0, 0.95)
    assert [each.numel() for each in found] == [0, 0]


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_a_value_gains_nothing_by_going_further_than_it_may(clip):
    before, returns = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, 0.1])
    values = torch.tensor([0.1, 0.5, 0.5, 0.5], requires_grad=True)
    loss = clipped_value_loss(values, before, returns, clip)
    plain = []
    for v, b, r in zip(values.tolist(), before.tolist(), returns.tolist(), strict=True):
        held = min(max(v, b - clip), b + clip) if clip else v
        plain.append(max((v - r) ** 2, (held - r) ** 2) / 2)
    assert loss.tolist() == pytest.approx(plain, rel=1e-6)
    (slopes,) = torch.autograd.grad(loss.sum(), values)
    assert slopes.tolist() == pytest.approx([-0.9, 0.0 if clip else -0.5, 1.5, 0.4], rel=1e-5)


def test_explained_is_the_share_of_variance_that_values_account_for():
    returns = torch.tensor([1.0, 3.0, 0.0, 4.0])

    def explained(values: torch.Tensor) -> float:
        n = len(returns)
        batch = type("Said", (), {"learnt": torch.arange(n), "values": values, "returns": returns})
        _, sums = Critic(0.0)(Output(values.new_zeros(()), None, values[None]), batch)
        return Critic().metrics({name: float(value) for name, value in sums.items()}, n)["explained"]

    assert explained(returns) == pytest.approx(1)
    assert explained(torch.full((4,), 2.0)) == pytest.approx(0)
    assert explained(torch.full((4,), 3.0)) < 0


# The stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    train_start(folder)
    return folder


STEPS = ["--max_steps", 3, "--batch_size", 4, "--eval_interval", 3, "--learning_rate", 1e-3]


def test_it_leaves_the_policy_and_keeps_the_critic_in_its_checkpoint(base):
    train_here("ppo", *stage_flags(base, "ppo", base / "out"), *STEPS)
    folder = base / "out/ppo_32"
    model = load_pretrained(folder)
    assert not model.config.scores and model.score is None
    assert {path.name for path in (folder / "checkpoints/step_000003/state").iterdir()} == {"policy", "critic"}
    first, *_, last = metrics(base / "out", "ppo")
    assert {"reward", "value_loss", "explained", "kl", "clip_share", "entropy"} <= first.keys()
    assert {"val_reward", "val_value_loss", "pass_at_1"} <= last.keys()
    assert first["logp_gap"] < 3e-5 and last["kl"] > 0


def test_a_critic_may_start_from_a_reward_model_and_from_no_other(base):
    train_here("reward", *stage_flags(base, "reward", base / "out"), "--max_steps", 2)
    flags = [*stage_flags(base, "ppo", base / "judged"), *STEPS, "--reward", f"reward_model:{base}/out/reward_32"]
    train_here("ppo", *flags, "--critic", base / "out/reward_32")
    first = metrics(base / "judged", "ppo")[0]
    assert first["reward_model_reward"] == pytest.approx(first["reward"], rel=1e-5)
    with pytest.raises(ValueError, match="found a model that writes, expected a reward model's folder"):
        train_here("ppo", *flags, "--critic", base / "start/full_sft_32", "--resume", "none")
    with pytest.raises(ValueError, match="critic was .* and is"):  # it is part of what a run is
        train_here("ppo", *flags)


def test_values_stand_where_tokens_are_drawn(base):
    """Of every drawn token the critic's score of the sequence before it, asked alone; and advantages are whitened."""
    from training.setup import load_data, start_machine, starting_model
    from training.valued import actor_critic, starting_critic, valued_rollouts

    config = load_config(PPOConfig, [str(each) for each in stage_flags(base, "ppo", base / "alone")])
    machine, start = start_machine(config), starting_model(config)
    critic = starting_critic(start)
    engine, objective = actor_critic(start, critic, machine), ppo_of(config)
    assert isinstance(engine, ActorCritic)
    source = valued_rollouts(load_data(start, machine), engine, start, objective).train
    batches = source.update(0)
    network = GPT(critic.model.config)
    network.load_state_dict(dict(critic.weights()))
    network.eval()
    everything = torch.cat([batch.advantages for batch in batches]).double()
    assert everything.mean().abs() < 1e-6 and everything.std(correction=0) == pytest.approx(1, rel=1e-5)
    batch, seen = batches[0], 0
    ends = batch.cu_seqlens.tolist()
    for first, end in itertools.pairwise(ends):
        places = batch.places[first:end]
        ids = batch.input_ids.flatten()[places]
        if not len(ids) or (batch.labels.flatten()[places] < 0).all():
            continue
        with torch.no_grad():
            scores = network(ids[None])[0, :, 0]
        drawn = batch.labels.flatten()[places] >= 0
        where = torch.searchsorted(batch.learnt, places[drawn])
        torch.testing.assert_close(batch.values[where], scores[drawn], atol=2e-5, rtol=1e-4)
        seen += int(drawn.sum())
    assert seen == len(batch.values) > 20


@pytest.mark.parametrize("flags", [("--gamma", "1.5"), ("--gae_lambda", "2"), ("--clip_low", "1")])
def test_flags_out_of_range_are_refused(flags):
    with pytest.raises(ValueError, match=flags[0]):
        load_config(PPOConfig, list(flags))


def test_a_fresh_critic_is_the_policys_network_and_a_head(base, tmp_path):
    from training.setup import starting_model
    from training.valued import starting_critic

    config = load_config(PPOConfig, [str(each) for each in stage_flags(base, "ppo", tmp_path)])
    start = starting_model(config)
    policy, critic = dict(start.weights()), dict(starting_critic(start).weights())
    assert critic.keys() - policy.keys() == {"score.weight"}
    assert all(torch.equal(critic[name], policy[name]) for name in policy)
    assert math.isclose(float(critic["score.weight"].std()), 0.02, rel_tol=0.5)
