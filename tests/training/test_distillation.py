"""Distillation beside its papers' formulas written out over whole logits in float64, its teachers, and their caches."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.gpt
from dataset import Loader, load_tokenizer
from dataset.batch import Batch
from dataset.loader import EMPTY_ROW, ENDLESS, TextRows
from model import GPT
from tests.conftest import encoded
from tests.dataset.foreign import CHATML, LLAMA3, make_foreign_folder
from tests.helpers import make_teacher, run_here, stage_flags, train_here, train_start
from training import Distillation, DistillConfig
from training.distillation import TopK, forward_kl, jsd, reverse_kl
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.frozen import FrozenOutputs
from training.objectives import Output
from training.setup import other_vocabulary, starting_model, starting_teacher
from training.teacher import TaughtBatch, Teacher
from training.top_k import fill_top_k, likeliest

KINDS = ("forward_kl", "reverse_kl", "jsd")
CHATS = [[1, 21, 22, 23, 24, 2], [1, 31, 32, 2], [1, 41, 42, 43, 44, 45, 46, 2], [1, 51, 52, 53, 2]]
SPANS = [[3, 6], [1, 4], [2, 4, 6, 8], [4, 5]]  # of tokens that the assistant said
Columns = dict[str, list]


def written_out(kind: str, p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """Divergence of (tokens, outcomes) probabilities, (tokens,), a formula a line."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0).sum(-1)

    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[kind]()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_and_its_gradient_are_the_papers(kind: str, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 23, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    expected = written_out(kind, teacher.softmax(-1), student.softmax(-1), beta)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    functions = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": partial(jsd, beta=beta)}
    found = functions[kind](teacher.log_softmax(-1), student.detach().log_softmax(-1))
    torch.testing.assert_close(found.value, expected.detach())
    torch.testing.assert_close(found.gradient, gradient)
    if kind == "forward_kl":
        theirs = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found.value, theirs.detach())


def test_jsd_goes_to_either_kl_at_its_ends() -> None:
    log_p, log_q = torch.randn(2, 5, 11, dtype=torch.float64).log_softmax(-1)
    near = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(jsd(log_p, log_q, 1e-6).value / 1e-6, forward_kl(log_p, log_q).value, **near)
    torch.testing.assert_close(jsd(log_p, log_q, 1 - 1e-6).value / 1e-6, reverse_kl(log_p, log_q).value, **near)
    torch.testing.assert_close(jsd(log_p, log_q, 1e-6).gradient / 1e-6, forward_kl(log_p, log_q).gradient, **near)


def chat_rows(columns: Columns | None = None) -> TextRows:
    return TextRows(encoded(**(columns or {"ids": CHATS, "spans": SPANS})), max_seq_len=9, pad_id=3)


def as_teacher(network: GPT, identity: str = "a teacher") -> Teacher:
    return Teacher(network.config, network.state_dict().items, identity)


@pytest.fixture
def teacher(make_model) -> Teacher:
    return as_teacher(make_model(seed=1, dim=48, n_layers=1))


def ask(network: GPT, batch: Batch, objective: Distillation) -> Output:
    criterion = partial(objective.criterion, batch=batch)
    return Output(*network(batch.input_ids, batch.position_ids, batch.labels, learnt=batch.learnt, criterion=criterion))


def whole_logits(network: GPT, batch: Batch) -> Tensor:
    """float64 (supervised, vocabulary)."""
    return network(batch.input_ids, batch.position_ids).double().flatten(0, 1)[batch.learnt]


def gradients(loss: Tensor, network: GPT) -> Tensor:
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(model.gpt, "LOSS_TOKENS", 1)
    monkeypatch.setitem(model.gpt.LOSS_BYTES, "cpu", 4 * 97 * 4)  # 11 tokens: two whole chunks and a rest


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_whole_logits(
    make_model, teacher, small_chunks, kind: str, temperature: float, ce_weight: float
) -> None:
    network = make_model(tie_embeddings=False)
    batch = chat_rows().collate([0, 1, EMPTY_ROW, 2])
    assert batch.supervised == 11
    objective = Distillation(kind, 0.3, temperature, ce_weight, teacher)
    loss, sums = objective(ask(network, batch, objective), batch)
    other = make_model(seed=1, dim=48, n_layers=1)
    p, q = ((whole_logits(each, batch) / temperature).softmax(-1) for each in (other, network))
    nll = F.cross_entropy(whole_logits(network, batch), batch.labels.flatten()[batch.learnt], reduction="sum")
    divergence = written_out(kind, p.detach(), q, 0.3).sum()
    expected = (1 - ce_weight) * temperature**2 * divergence + ce_weight * nll
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradients(loss, network), gradients(expected, network)) < 1e-5
    metrics = objective.metrics({name: float(value) for name, value in sums.items()}, 11.0)
    assert metrics == {
        "loss": pytest.approx(expected.item() / 11, rel=1e-5),
        "ce_loss": pytest.approx(nll.item() / 11, rel=1e-5),
        "divergence": pytest.approx(divergence.item() / 11, rel=1e-5),
    }


def test_chunks_change_nothing(make_model, teacher, request) -> None:
    network, batch, objective = make_model(), chat_rows().collate([0, 1, 2]), Distillation("jsd", teacher=teacher)
    whole = gradients(ask(network, batch, objective).loss, network)
    request.getfixturevalue("small_chunks")
    assert relative(gradients(ask(network, batch, objective).loss, network), whole) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_like_the_teacher_has_nothing_to_learn(make_model, kind: str) -> None:
    network, batch = make_model(), chat_rows().collate([0, 1, 2])
    objective = Distillation(kind, temperature=1.5, teacher=as_teacher(make_model()))
    output = ask(network, batch, objective)
    assert output.loss is not None and abs(output.loss.item()) < 1e-5 * output.nll.item()
    assert gradients(output.loss, network).abs().max() < 1e-4


def test_a_teacher_is_frozen_and_has_no_dropout(make_model, teacher) -> None:
    batch, like = chat_rows().collate([0, 1, 2]), torch.zeros(())
    said = teacher.ask(batch, like)
    assert not said.hidden.requires_grad and not said.weight.requires_grad
    wild = Teacher(replace(teacher.config, dropout=0.5), teacher.weights, "")
    assert torch.equal(wild.ask(batch, like).hidden, said.hidden)
    half = Teacher(teacher.config, teacher.weights, "").ask(batch, like.bfloat16())
    assert half.hidden.dtype == half.weight.dtype == torch.bfloat16


def test_compiled_it_is_the_same(make_model, teacher) -> None:
    network, batch = make_model(n_layers=1), chat_rows().collate([0, 1, 2])
    for objective in (Distillation("jsd", teacher=teacher), Distillation("forward_kl", 0.5, 2.0, 0.3, teacher)):
        plain = gradients(ask(network, batch, objective).loss, network)
        compiled = make_model(n_layers=1)
        compiled.compile_parts("eager")
        assert relative(gradients(ask(compiled, batch, objective).loss, compiled), plain) < 1e-6
    torch.compiler.reset()


# The likeliest tokens alone -------------------------------------------------------------------------------------------


def taught(batch: Batch, known: TopK) -> TaughtBatch:
    return TaughtBatch(**vars(batch), teacher_ids=known.ids, teacher_logps=known.logps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_of_all_tokens_are_the_whole_teacher(make_model, teacher, small_chunks, kind: str) -> None:
    network, batch = make_model(), chat_rows().collate([0, 1, EMPTY_ROW])
    objective = Distillation(kind, 0.3, 2.0, 0.2, teacher)
    known = likeliest(teacher.ask(batch, torch.zeros(())), 97, 2.0)
    whole, by_heart = (ask(network, each, objective).loss for each in (batch, taught(batch, known)))
    assert by_heart.item() == pytest.approx(whole.item(), rel=1e-5)
    assert relative(gradients(by_heart, network), gradients(whole, network)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_mass_that_is_left_is_one_outcome_more(make_model, teacher, small_chunks, kind: str) -> None:
    """Three tokens and "one of the others": value and gradient are those of four outcomes."""
    network, batch = make_model(), chat_rows().collate([0, 1, 2])
    known = likeliest(teacher.ask(batch, torch.zeros(())), 3, 2.0)
    loss = ask(network, taught(batch, known), Distillation(kind, 0.3, 2.0)).loss

    def outcomes(probabilities: Tensor) -> Tensor:
        mine = probabilities.gather(1, known.ids)
        return torch.cat([mine, 1 - mine.sum(1, keepdim=True)], 1)

    other = make_model(seed=1, dim=48, n_layers=1)
    p, q = (outcomes((whole_logits(each, batch) / 2).softmax(-1)) for each in (other, network))
    expected = 4 * written_out(kind, p.detach(), q, 0.3).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradients(loss, network), gradients(expected, network)) < 1e-5


@pytest.fixture
def fill(make_model, tmp_path) -> Callable[..., Loader]:
    """fill(teacher, **flags) -> a loader of two rows an update whose rows have been asked about; cached in tmp_path."""

    def make(teacher: Teacher, max_steps: int = 2, **flags: object) -> Loader:
        config = DistillConfig(
            cache_dir=str(tmp_path), out_dir=str(tmp_path), batch_size=2, max_steps=max_steps, teacher_top_k=4, dim=32
        )
        config = replace(config, **flags)  # type: ignore[arg-type]
        engine = SingleEngine(make_model(), config, Machine(World(), torch.device("cpu"), torch.float32))
        loader = Loader(chat_rows(), 2, total_rows=ENDLESS)
        fill_top_k(loader, teacher, engine, config)
        return loader

    return make


def test_rows_bring_along_what_the_teacher_says_of_them(fill, teacher) -> None:
    rows = fill(teacher, distill_temperature=2.0).rows
    batch = rows.collate([2, EMPTY_ROW, 0])
    expected = likeliest(teacher.ask(batch, torch.zeros(())), 4, 2.0)
    assert isinstance(batch, TaughtBatch) and len(batch.teacher_ids) == batch.supervised
    assert torch.equal(batch.teacher_ids, expected.ids)
    torch.testing.assert_close(batch.teacher_logps, expected.logps)
    assert torch.equal(batch.labels, chat_rows().collate([2, EMPTY_ROW, 0]).labels)
    assert rows.collate([EMPTY_ROW]).teacher_logps.shape == (0, 5)


def test_a_teacher_is_asked_about_a_row_once(fill, teacher, monkeypatch, tmp_path) -> None:
    """Of a run of one step, two rows; the one that comes to all asks for the third."""
    asked: list[list[int]] = []
    ask_about = FrozenOutputs.fill
    monkeypatch.setattr(
        FrozenOutputs,
        "fill",
        lambda self, tables, wanted, *rest: (asked.append(wanted), ask_about(self, tables, wanted, *rest)),
    )
    few = fill(teacher, max_steps=1)
    seen = sorted(few.order(0)[:2].tolist())
    with pytest.raises(ValueError, match="the teacher was not asked about these rows"):
        few.update(2)
    first = few.rows.collate(seen).teacher_logps
    whole = fill(teacher)
    assert torch.equal(whole.rows.collate(seen).teacher_logps, first)
    fill(teacher)
    assert asked == [seen, [({0, 1, 2} - set(seen)).pop()]]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["teacher", "distill_temperature", "teacher_top_k"])
def test_another_teacher_temperature_or_number_has_a_cache_of_its_own(fill, teacher, tmp_path, change: str) -> None:
    fill(teacher)
    fill(replace(teacher, identity="another"), **({} if change == "teacher" else {change: 3}))
    assert len(list(tmp_path.iterdir())) == 2


def test_more_tokens_than_there_are_is_an_error(fill, teacher) -> None:
    with pytest.raises(ValueError, match="--teacher_top_k is 98, the teacher has 97 tokens"):
        fill(teacher, teacher_top_k=98)


# The run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    train_start(folder)
    return folder


def found_teacher(base: Path, folder: Path | None, **flags: object) -> Teacher:
    student = str(base / "start/pretrain_32")
    config = DistillConfig(init_from=student, teacher=None if folder is None else str(folder), **flags)  # type: ignore[arg-type]
    machine = Machine(World(), torch.device("cpu"), torch.float32)
    return starting_teacher(starting_model(config), machine)


def test_no_teacher_or_one_that_does_not_fit_is_told(base: Path, tmp_path: Path, make_model, tokenizer) -> None:
    with pytest.raises(ValueError, match="no teacher to learn from; give .* with --teacher"):
        found_teacher(base, None)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        found_teacher(base, Path("nowhere"))
    with pytest.raises(
        ValueError, match=r"base/short has a context of 32 tokens, and rows are 64; give --max_seq_len 32"
    ):
        found_teacher(base, make_teacher(tmp_path / "base/short", max_seq_len=32))
    larger = make_teacher(tmp_path / "larger", vocab_size=6464)
    with pytest.raises(
        ValueError, match=r"larger has another vocabulary than the student .*pretrain_32: 6,464 rows .* 6,400"
    ):
        found_teacher(base, larger)


def test_vocabularies_are_compared_token_by_token(tmp_path: Path, tokenizer) -> None:
    """How a model chats does not matter, nor how text is cut; what its tokens are called does."""
    folders = [make_foreign_folder(tmp_path / name, template) for name, template in (("a", CHATML), ("b", LLAMA3))]
    swapped = make_foreign_folder(tmp_path / "swapped") / "tokenizer.json"
    content = json.loads(swapped.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    swapped.write_text(json.dumps(content))
    plain, other_chat, other = map(load_tokenizer, [*folders, swapped.parent])
    assert plain.fingerprint != other_chat.fingerprint and other_vocabulary(plain, other_chat) == ""
    assert other_vocabulary(plain, other) == f"token {plain.encode('x')[-1]} is 'x', and 'y'"
    assert other_vocabulary(tokenizer, plain) == "6,400 tokens, and 259"


def test_another_teacher_is_another_run(base: Path, tmp_path: Path) -> None:
    flags = [*stage_flags(base, "distill", tmp_path), "--max_steps", 2, "--save_interval", 1]
    train_here("distill", *flags)
    other = make_teacher(tmp_path / "other", n_layers=2)
    done = run_here("distill", *flags, "--max_steps", 3, "--teacher", other)
    assert done.returncode == 2 and "teacher" in done.stderr and "--resume none" in done.stderr
