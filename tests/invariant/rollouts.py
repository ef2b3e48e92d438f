"""What the tests of engines share about rollouts: the model's own answers, and what is learnt from them, are the same
however many processes draw them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers import LORA, ROLLOUTS, metrics, stage_flags, train_here

STEPS = 5
CURVES = ("reward", "reward_std", "loss", "grad_norm", "kl", "entropy", "length", "zero_variance", "distinct", "tokens")
CRITIC = ("value_loss",)
HELD_OUT = ("val_reward", "pass_at_1", "val_entropy", "val_ended")
TAUGHT = ("loss", "divergence", "ce_loss", "grad_norm", "tokens")  # of on-policy distillation, which has no reward
# the question's number decides whether its answers differ in worth, so of two ranks one may have nothing to learn from
OWN = """def longer(messages, answer, row):
    return len(answer) / 20 if int(messages[-1]["content"].split()[0]) % 2 else 0.5
"""
KINDS = ("plain", "filtered", "unfiltered", "lora", "ppo", "taught")


def rollout_runs(
    base: Path, name: str, ranks: int, *flags: str, wanted: Sequence[str] = KINDS
) -> list[tuple[str, list]]:
    """Every prompt teaching; with prompts whose answers are all worth the same, left out or not; an adapter; several
    updates from the same answers; a critic beside the policy; a teacher's word on every token."""
    own = ["--reward", f"{base}/own.py:longer", "--batch_size", 2 // ranks, "--global_batch_size", 2]
    kinds = {
        "plain": ["--batch_size", 4 // ranks, "--scale_rewards", "std", "--temperature", 0.8],
        "filtered": [*own, "--filter_groups"],
        "unfiltered": [*own, "--loss_type", "gspo", "--kl", 0.1],
        "lora": ["--batch_size", 4 // ranks, "--loss_type", "grpo", "--inner_epochs", 2, *LORA],
        "ppo": [*own, "--inner_epochs", 2, "--critic_learning_rate", 2e-3],
    }
    drawn = ["--on_policy", "--init_from", base / "start/full_sft_32", *ROLLOUTS, "--distill_loss", "jsd"]
    kinds["taught"] = [*drawn, "--batch_size", 4 // ranks, "--eval_answers", 4]
    steps = ["--max_steps", STEPS, "--learning_rate", 1e-3, "--eval_interval", 3, "--save_interval", 3]
    return [
        (stage, [*stage_flags(base, stage, base / name), *steps, *kinds[kind], *flags, "--run_name", f"{kind}_32"])
        for kind in wanted
        for stage in [{"ppo": "ppo", "taught": "distill"}.get(kind, "grpo")]
    ]


def train_rollouts_alone(base: Path) -> None:
    """What one process makes of each kind, from the model of `train_start`."""
    (base / "own.py").write_text(OWN)
    for stage, flags in rollout_runs(base, "single", 1):
        train_here(stage, *flags)


def same_rollouts_as_alone(base: Path, engine: str, kind: str) -> None:
    alone, spread = (metrics(base / name, kind) for name in ("single", engine))
    assert [record["step"] for record in spread] == list(range(1, STEPS + 1))
    curves = {"ppo": (*CURVES, *CRITIC), "taught": TAUGHT}.get(kind, CURVES)
    for name in curves:
        assert [r[name] for r in spread] == pytest.approx([r[name] for r in alone], rel=1e-4, abs=1e-6), name
    for name in ("val_loss", "val_ended") if kind == "taught" else HELD_OUT:
        measured = [[r[name] for r in records if name in r] for records in (alone, spread)]
        assert len(measured[0]) == 2 and measured[1] == pytest.approx(measured[0], rel=1e-5), name
    if kind not in ("lora", "ppo", "taught"):  # there, what the first pass learnt
        assert all(record["logp_gap"] < 3e-5 for record in spread)


def rollouts_tell_something(base: Path) -> None:
    """Rewards vary, weights move, and in some update one of two ranks had nothing to learn from."""
    plain, filtered = metrics(base / "single", "plain"), metrics(base / "single", "filtered")
    assert plain[-1]["kl"] > 1e-4 and len({record["reward"] for record in plain}) == STEPS
    assert 0.5 in [record["zero_variance"] for record in filtered]
    taught = metrics(base / "single", "taught")
    assert len({record["loss"] for record in taught}) == STEPS and taught[0]["loss"] > 1e-3
    lora = metrics(base / "single", "lora")
    assert lora[0]["logp_gap"] > 1e-4 and lora[0]["kl"] > 0  # of the second pass
