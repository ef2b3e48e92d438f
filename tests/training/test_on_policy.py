"""On-policy distillation: the loss beside whole sequences read one by one, and that drawn answers alone are learnt."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dataset import PROMPT, Loader, build_rows
from model import GPT
from tests.helpers import (
    ROLLOUTS,
    losses,
    make_teacher,
    metrics,
    stage_flags,
    train_here,
    train_start,
    write_jsonl,
)
from tests.training.test_distillation import as_teacher, gradients, relative, written_out
from training import Distillation, DistillConfig, load_config
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.groups import Group
from training.rollout import Rollouts, plain_rollouts, sampling_of
from training.setup import load_data, starting_model, starting_teacher

MACHINE = Machine(World(), torch.device("cpu"), torch.float32)
DRAWN = ["--group_size", "3", "--max_new_tokens", "9", "--temperature", "0.9"]
TEXTS = ["Hi", "What is 6 x 7?", "a b c d e f g", "你好", "Why?"]


@pytest.fixture
def make_rollouts(tmp_path: Path, tokenizer, make_model):
    rows = [{"conversations": [{"role": "user", "content": text}]} for text in TEXTS]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    engine = SingleEngine(make_model(vocab_size=6400), DistillConfig(), MACHINE)
    prompts = build_rows(PROMPT, str(path), tokenizer, 48, cache_dir=tmp_path / "cache")
    config = load_config(DistillConfig, ["--on_policy", *DRAWN])

    def make(batch_size: int = 4, rank: int = 0, ranks: int = 1) -> Rollouts:
        loader = Loader(prompts, batch_size, rank=rank, world_size=ranks, rows_per_update=4, seed=5)
        return Rollouts(loader, engine, tokenizer, sampling_of(config))

    return make


def one_by_one(network: GPT, groups: list[Group], temperature: float = 1.0) -> Tensor:
    """log softmax over the vocabulary at every drawn token, of each prompt and answer alone: float64 (tokens, v)."""
    found = []
    for group in groups:
        for answer in group.answers:
            logits = network(torch.tensor([group.prompt + answer.ids])).double()[0]
            found.append((logits[len(group.prompt) - 1 : -1] / temperature).log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_loss_is_the_divergence_at_every_drawn_token(make_rollouts, make_model, kind: str) -> None:
    """Groups behind one prompt beside each sequence alone, value and gradient; the answers are constants to both."""
    rollouts, teacher = make_rollouts(), make_model(seed=1, dim=48, n_layers=1, vocab_size=6400)
    engine, network = rollouts.engine, rollouts.engine.model
    objective = Distillation(kind, 0.3, 2.0, teacher=as_teacher(teacher))
    (batch,), groups = rollouts.update(0), rollouts.answered([0, 1, 2, 3], network)
    drawn = [answer for group in groups for answer in group.answers]
    assert batch.supervised == objective.weight(batch) == sum(len(answer.ids) for answer in drawn) > 60
    p, q = (one_by_one(each, groups, 2.0) for each in (teacher, network))
    expected = 4 * written_out(kind, p.exp().detach(), q.exp(), 0.3).sum()
    loss, sums = objective(engine.ask(batch, objective), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradients(loss, network), gradients(expected, network)) < 1e-5
    logged = objective.metrics({name: float(value) for name, value in sums.items()}, batch.supervised)
    own = one_by_one(network, groups).gather(1, torch.tensor([[i] for answer in drawn for i in answer.ids]))
    assert logged["ce_loss"] == pytest.approx(-own.mean().item(), rel=1e-5)


def test_a_rank_without_prompts_weighs_nothing(make_rollouts, make_model) -> None:
    rollouts = make_rollouts(2, rank=3, ranks=4)
    (empty,) = rollouts.update(4)
    objective = Distillation("jsd", teacher=as_teacher(make_model(seed=1, vocab_size=6400)))
    totals = rollouts.engine.forward_backward([empty], objective, 1.0).read()
    assert objective.weight(empty) == 0 and totals.sums == {"loss": 0, "ce_loss": 0}
    assert all(p.grad is None or not p.grad.any() for p in rollouts.engine.model.parameters())


# The run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_policy")
    train_start(folder)
    return folder


def flags_of(base: Path, out: Path, *flags: object) -> list:
    chats = ["--init_from", base / "start/full_sft_32"]
    return [*stage_flags(base, "distill", out), "--on_policy", *chats, *ROLLOUTS, *flags]


def test_the_answers_of_the_data_are_never_read(base: Path, tmp_path: Path) -> None:
    """Rows without their last answer teach the same, and held-out answers are drawn by other numbers."""
    flags = flags_of(base, tmp_path / "whole", "--max_steps", 3, "--learning_rate", 1e-3)
    train_here("distill", *flags)
    rows = [json.loads(line) for line in (base / "sft.jsonl").read_text().splitlines()]
    cut = [{"conversations": row["conversations"][:-1]} for row in rows]
    asked = write_jsonl(tmp_path / "asked.jsonl", cut)
    train_here("distill", *flags, "--data_path", asked, "--out_dir", tmp_path / "asked")
    assert losses(tmp_path / "asked", "distill") == losses(tmp_path / "whole", "distill")
    start = starting_model(load_config(DistillConfig, [str(flag) for flag in flags]))
    engine = SingleEngine(start.model, start.config, MACHINE, start.weights)
    sources = plain_rollouts(load_data(start, MACHINE), engine, start)
    assert sources.val is not None and sources.train.how._replace(seed=0) == sources.val.how._replace(seed=0)
    assert sources.train.how.seed != sources.val.how.seed
    assert "val_loss" in metrics(tmp_path / "whole", "distill")[-1]


def test_the_loss_does_not_depend_on_the_split(base: Path, tmp_path: Path) -> None:
    steps = ["--max_steps", 6, "--learning_rate", 1e-3, "--distill_loss", "reverse_kl"]
    splits = {"8": [8], "4 x 2": [4, "--accumulation_steps", 2], "3 x 3": [3, "--global_batch_size", 8]}
    for name, split in splits.items():
        train_here("distill", *flags_of(base, tmp_path / name, *steps, "--batch_size", *split))
    seen = {name: losses(tmp_path / name, "distill") for name in splits}
    assert seen["8"][6] < seen["8"][1]
    for name in splits:
        assert seen[name] == pytest.approx(seen["8"], rel=1e-5), name


def test_what_does_not_fit_is_told(base: Path, tmp_path: Path) -> None:
    for flags, told in (
        (["--on_policy", "--teacher_top_k", "8"], "--teacher_top_k 8: not with --on_policy true"),
        (["--on_policy", "--ce_weight", "0.5"], "--ce_weight 0.5: not with --on_policy true"),
        (["--group_size", "4", "--temperature", "2"], "--group_size 4, --temperature 2.0: not with --on_policy false"),
    ):
        with pytest.raises(ValueError, match=told):
            load_config(DistillConfig, flags)
    short = make_teacher(tmp_path / "short", max_seq_len=32)
    flags = [str(flag) for flag in flags_of(base, tmp_path, "--teacher", short, "--max_seq_len", 32)]
    with pytest.raises(ValueError, match=r"short has a context of 32 tokens, and the student draws .* 64; .*longer"):
        starting_teacher(starting_model(load_config(DistillConfig, flags)), MACHINE)
