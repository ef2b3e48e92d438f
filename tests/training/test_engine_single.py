"""The engine of one process against plain PyTorch: gradients, updates, what it reports, and what it leaves alone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dataset.loader import EMPTY_ROW, TextRows
from model import GPT, GPTConfig, load_pretrained, save_pretrained
from model.gpt import fresh_weights
from tests.conftest import TINY, encoded
from training import NextToken, PretrainConfig
from training.distributed import World
from training.engines import Machine, SingleEngine

# one document a row; spans are what is learnt, so that rows weigh differently: 7, 2, 1 and 3 labels
DOCUMENTS = [[1, 21, 22, 23, 24, 25, 26, 2], [1, 31, 32, 33, 34, 2], [1, 41, 42, 43, 2], [1, 51, 52, 53, 54, 55, 2]]
SPANS = [[0, 8], [2, 4], [4, 5], [1, 2, 5, 7]]
SPLITS = {
    "at once": [[0, 1, 2, 3]],
    "one by one": [[2], [0], [3], [1]],
    "padded": [[3, EMPTY_ROW, 0], [1, 2, EMPTY_ROW]],
}


def batches(split: list[list[int]]) -> list:
    rows = TextRows(encoded(ids=DOCUMENTS, spans=SPANS), 7, 3)
    order = [int(rows.packing.document[rows.packing.offsets[row]]) for row in range(len(rows))]
    assert sorted(order) == [0, 1, 2, 3]
    return [rows.collate([order.index(row) if row != EMPTY_ROW else row for row in part]) for part in split]


def learnt(document: int) -> list[int]:
    """Places of the labels that are learnt."""
    edges = SPANS[document]
    return [i - 1 for start, end in zip(edges[::2], edges[1::2], strict=True) for i in range(max(start, 1), end)]


def plain_loss(model: GPT, document: int) -> torch.Tensor:
    ids, places = torch.tensor(DOCUMENTS[document]), learnt(document)
    return F.cross_entropy(model(ids[None, :-1])[0, places], ids[1:][places], reduction="sum")


WEIGHT = sum(len(learnt(document)) for document in range(4))


def plain_gradient(model: GPT) -> list[torch.Tensor]:
    loss = sum((plain_loss(model, document) for document in range(4)), torch.tensor(0.0)) / WEIGHT
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.fixture
def make_engine(make_model):
    def make(dtype=torch.float32, model: GPT | None = None, shape: dict | None = None, **flags) -> SingleEngine:
        model = model or make_model(n_layers=2, **(shape or {}))
        config = PretrainConfig(**{"optimizer": "adamw", "learning_rate": 1e-3} | flags)
        return SingleEngine(model, config, Machine(World(), torch.device("cpu"), dtype))

    return make


def parameters(engine: SingleEngine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def gradients(engine: SingleEngine) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in engine.model.parameters()]


def norm_of(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


class Poisoned(NextToken):
    """Losses as they are, and a gradient that is no number."""

    def __call__(self, output, batch):
        loss, sums = super().__call__(output, batch)
        return loss * torch.nan, sums


# The gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_a_sum_divided_once_however_rows_are_split(make_engine, make_model, split, tied):
    engine = make_engine(shape={"tie_embeddings": tied})
    engine.forward_backward(batches(split), NextToken())
    torch.testing.assert_close(gradients(engine), plain_gradient(make_model(tie_embeddings=tied)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_totals_are_sums_over_all_micro_batches_and_losses_are_of_each(make_engine, make_model, split):
    sizes = torch.arange(97)
    totals = make_engine().forward_backward(batches(split), NextToken(sizes)).read()
    losses = [plain_loss(make_model(), document).item() for document in range(4)]
    labels = [DOCUMENTS[document][place + 1] for document in range(4) for place in learnt(document)]
    assert totals.weight == WEIGHT == 13
    assert totals.sums == {"loss": pytest.approx(sum(losses), rel=1e-5), "bytes": sum(labels)}
    each = [sum(losses[document] for document in part if document != EMPTY_ROW) for part in split]
    assert [float(loss) for loss in totals.losses] == pytest.approx(each, rel=1e-5)


def test_an_update_of_padding_alone_changes_nothing(make_engine):
    engine = make_engine(weight_decay=0.0)
    before = parameters(engine)
    totals = engine.forward_backward(batches([[EMPTY_ROW], [EMPTY_ROW]]), NextToken()).read()
    assert totals.weight == 0 and totals.sums == {"loss": 0.0} and [float(loss) for loss in totals.losses] == [0, 0]
    assert engine.step(1e-2).read() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(engine), strict=True))


def test_the_norm_of_a_large_gradient_is_exact(make_engine):
    """Of 3 million numbers PyTorch's own is off by 6e-5 on a CPU, and clipping with it."""
    engine = make_engine(shape={"vocab_size": 6000, "dim": 512})
    parameters = list(engine.model.parameters())
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    exact = sum(parameter.grad.double().square().sum() for parameter in parameters).sqrt()
    assert engine.step(0.0).read() == pytest.approx(exact.item(), rel=5e-7)


# The update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_clip", [0.5, 0.0, 1e6])
def test_an_update_is_adamw_on_the_clipped_gradient_and_gives_the_norm_before(make_engine, make_model, grad_clip):
    engine = make_engine(grad_clip=grad_clip, weight_decay=0.25)
    model, before = make_model(), parameters(engine)
    gradient = plain_gradient(model)
    norm, rate = norm_of(gradient), 1e-2
    assert norm > 0.5
    engine.forward_backward(batches([[0, 1], [2, 3]]), NextToken())
    assert engine.step(rate).read() == pytest.approx(norm, rel=1e-4)
    scale = grad_clip / norm if 0 < grad_clip < norm else 1.0
    decays = [0.25 if role.decays else 0.0 for role in model.roles().values()]
    (adamw,) = engine.optimizers
    for parameter, old, g, decay in zip(engine.model.parameters(), before, gradient, decays, strict=True):
        # what the first step keeps is a tenth of the gradient that it was given
        torch.testing.assert_close(adamw.state[parameter]["exp_avg"], 0.1 * scale * g, rtol=1e-3, atol=1e-6)
        # and it moves every weight by the learning rate, whatever the gradient's size
        sure = (scale * g).abs() > 1e-4
        expected = old * (1 - rate * decay) - rate * g.sign()
        torch.testing.assert_close(parameter.detach()[sure], expected[sure], rtol=1e-4, atol=1e-5)
        assert parameter.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_skips_the_update_and_leaves_no_trace(make_engine, optimizer):
    engine, other = make_engine(optimizer=optimizer), make_engine(optimizer=optimizer)
    before = parameters(engine)
    engine.forward_backward(batches([[0], [1]]), Poisoned())
    assert not engine.step(1e-2).read() < float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(engine), strict=True))
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    for each in (engine, other):
        each.forward_backward(batches([[0, 1]]), NextToken())
        each.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(parameters(engine), parameters(other), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_the_learning_rate_it_is_given(make_engine, optimizer):
    engine = make_engine(optimizer=optimizer, learning_rate=0.5)
    before = parameters(engine)
    for rate in (0.0, 1e-3):
        engine.forward_backward(batches([[0, 1]]), NextToken())
        engine.step(rate)
        moved = max((a - b).abs().max().item() for a, b in zip(before, parameters(engine), strict=True))
        assert moved == 0 if rate == 0 else 0 < moved < 0.1


# Without gradients ----------------------------------------------------------------------------------------------


def test_evaluation_uses_no_dropout_and_leaves_no_gradient(make_engine, make_model):
    engine = make_engine(shape={"dropout": 0.5})
    engine.forward_backward(batches([[0]]), NextToken())  # a training update has just been learnt
    engine.step(0.0)
    totals = engine.evaluate(batches([[0, 1], [2, 3, EMPTY_ROW]]), NextToken())
    losses = [plain_loss(make_model(), document).item() for document in range(4)]
    assert totals.weight == WEIGHT and totals.sums == {"loss": pytest.approx(sum(losses), rel=1e-5)}
    assert [float(loss) for loss in totals.losses] == pytest.approx([sum(losses[:2]), sum(losses[2:])], rel=1e-5)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_training_goes_on_with_dropout_after_an_evaluation(make_engine):
    engine = make_engine(shape={"dropout": 0.5})
    engine.evaluate(batches([[0]]), NextToken())
    found = {engine.forward_backward(batches([[0]]), NextToken()).read().sums["loss"] for _ in range(3)}
    assert len(found) == 3


def test_per_place_are_the_losses_of_single_tokens_without_dropout_and_gradient(make_engine, make_model):
    engine = make_engine(shape={"dropout": 0.5})
    engine.model.train()
    (batch,) = batches([[1, EMPTY_ROW, 3]])
    nll = engine.per_place(batch).nll
    assert nll.shape == (3, 7) and nll.dtype == torch.float32 and not nll.requires_grad
    for row, document in ((0, 1), (2, 3)):
        ids = torch.tensor(DOCUMENTS[document])
        plain = F.cross_entropy(make_model()(ids[None, :-1])[0], ids[1:], reduction="none")
        expected = torch.zeros(7)
        expected[learnt(document)] = plain[learnt(document)].detach()
        torch.testing.assert_close(nll[row], expected, rtol=1e-4, atol=1e-5)
    assert not nll[1].any()


def test_generation_is_with_the_model_itself_in_eval_mode(make_engine):
    engine = make_engine(shape={"dropout": 0.5})
    engine.forward_backward(batches([[0]]), NextToken())
    with engine.generator() as model:
        assert model is engine.model and not any(module.training for module in model.modules())


# Weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_float32_on_the_cpu_by_the_names_in_a_model_folder(make_engine, tmp_path, dtype):
    engine = make_engine(dtype)
    engine.forward_backward(batches([[0, 1, 2, 3]]), NextToken())
    engine.step(1e-3)
    weights = engine.weights()
    assert {(w.dtype, w.device.type, w.requires_grad) for w in weights.values()} == {(torch.float32, "cpu", False)}
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"} <= set(weights)
    save_pretrained(engine.model, tmp_path, weights=weights)
    read = load_pretrained(tmp_path).state_dict()
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_memory_filled_with_weights_is_the_model_made_whole(make_engine, tied):
    shape = GPTConfig(**(TINY | {"tie_embeddings": tied}))
    weights = partial(fresh_weights, shape, 5)
    whole = GPT(shape)
    whole.load_state_dict(dict(weights()))
    with torch.device("meta"):
        hollow = GPT(shape)
    config, machine = PretrainConfig(), Machine(World(), torch.device("cpu"), torch.float32)
    engines = [SingleEngine(hollow, config, machine, weights), SingleEngine(whole, config, machine)]
    for engine in engines:
        engine.forward_backward(batches([[0, 1], [2, 3]]), NextToken())
        engine.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(*map(parameters, engines), strict=True))
    assert not any(parameter.is_meta for parameter in engines[0].model.parameters())


def test_a_model_that_is_not_filled_to_the_last_weight_is_an_error(make_model):
    some = [item for item in make_model().state_dict().items() if item[0] != "model.norm.weight"]
    with pytest.raises(AssertionError, match="model.norm.weight"):
        SingleEngine(make_model(), PretrainConfig(), Machine(World(), torch.device("cpu"), torch.float32), lambda: some)


# Precision, recomputation, compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_and_betas_are_this_runs_after_a_checkpoint_of_others_is_loaded(make_engine, tmp_path, optimizer):
    def settings(engine):
        return [
            {name: value for name, value in group.items() if name != "params"}
            for each in engine.optimizers
            for group in each.param_groups
        ]

    before = make_engine(optimizer=optimizer, weight_decay=0.1)
    before.forward_backward(batches([[0, 1]]), NextToken())
    before.step(1e-2)
    before.save(tmp_path / "state", background=False)
    engine = make_engine(optimizer=optimizer, weight_decay=0.3, beta1=0.7, beta2=0.8)
    own = settings(engine)
    engine.load(tmp_path / "state")
    assert settings(engine) == own
    assert {group["weight_decay"] for group in own} == {0.3, 0.0} and own[-1]["betas"] == (0.7, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), engine.model.parameters(), strict=True))
    state, loaded = (each.optimizers[-1].state_dict()["state"][0] for each in (before, engine))
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_in_float16_and_back(make_engine, tmp_path, dtype):
    rows = batches([[0, 1, 2, 3]])
    first, second, third = make_engine(dtype), make_engine(torch.float16), make_engine(dtype)
    for engine, folder, following in ((first, "a", second), (second, "b", third)):
        engine.forward_backward(rows, NextToken())
        engine.step(1e-2)
        engine.save(tmp_path / folder, background=False)
        following.load(tmp_path / folder)
        parameters = (each.model.parameters() for each in (engine, following))
        assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    assert second.scaler.get_scale() > 1 and not third.scaler.is_enabled()


def test_the_scale_of_float16_comes_back(make_engine, tmp_path):
    engine, following = make_engine(torch.float16), make_engine(torch.float16)
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 4.0})
    engine.save(tmp_path / "state", background=False)
    following.load(tmp_path / "state")
    assert following.scaler.get_scale() == 4.0


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_float16_alone_scales_the_loss(make_engine, dtype, scales):
    assert make_engine(dtype).scales_loss is scales


def test_float16_finds_a_scale_and_then_learns_the_same_gradient(make_engine, make_model):
    engine, expected = make_engine(torch.float16), norm_of(plain_gradient(make_model()))
    before = parameters(engine)
    for _ in range(25):
        engine.forward_backward(batches([[0, 1], [2, 3]]), NextToken())
        norm = engine.step(1e-3).read()
        if norm < float("inf"):
            break
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(engine), strict=True))
    assert norm == pytest.approx(expected, rel=0.02)
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(engine), strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in engine.model.parameters())


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_recomputation_runs_every_block_twice_in_training_alone(make_engine, recompute, times):
    engine = make_engine(grad_checkpointing=recompute)
    ran = []
    for i, block in enumerate(engine.model.blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    engine.forward_backward(batches([[0, 1]]), NextToken())
    assert sorted(ran) == sorted([0, 1] * times)
    ran.clear()
    engine.evaluate(batches([[0, 1]]), NextToken())
    assert ran == [0, 1]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_model_says_itself_what_its_blocks_are_and_how_it_recomputes(make_engine, wanted):
    class Block:
        def compile(self, **how):
            asked.append(how)

    class Other(GPT):
        def blocks(self):
            return [Block(), Block(), Block()]

        def recompute_activations(self, wanted):
            asked.append(wanted)

    asked: list = []
    make_engine(model=Other(GPTConfig(**TINY)), compile=wanted, grad_checkpointing=wanted)
    assert asked == [wanted] + [{"dynamic": False, "backend": "inductor"}] * (3 if wanted else 0)
