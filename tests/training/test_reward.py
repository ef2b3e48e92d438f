"""The reward model: packed pairs against answers one by one, its loss in plain numbers, what a stage starts from."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dataset import SCORED
from dataset.columns import Report
from dataset.loader import EMPTY_ROW, ScoredRows
from model import load_config, load_pretrained
from model.adapter_folder import base_folder
from model.adapters import body
from model.attention import Layout
from model.folder import folder_weights
from model.gpt import Places, nll_by_place, score_by_place
from tests.conftest import encoded
from tests.helpers import make_data, metrics, stage_flags, train_here, train_start
from tests.training.test_objectives import CHOSEN, PROMPT, REJECTED, gradient, relative
from training import BradleyTerry, RewardConfig, SFTConfig
from training import load_config as config_of
from training.objectives import Output, by_answer


def rows(max_seq_len: int = 12) -> ScoredRows:
    columns = {"chosen": [PROMPT + a for a in CHOSEN], "rejected": [PROMPT + a for a in REJECTED], "prompt": [3] * 4}
    return ScoredRows(encoded(**columns), max_seq_len=max_seq_len, pad_id=3)


def ask(model, batch) -> Output:
    layout = Layout(batch.cu_seqlens, batch.longest, batch.places, batch.tokens)
    said = model(
        batch.input_ids, batch.position_ids, batch.labels,
        layout=layout, learnt=batch.learnt, criterion=score_by_place,
    )  # fmt: skip
    return Output(*said)


def score_alone(model, answer: list[int]) -> torch.Tensor:
    """The last token's score of one conversation, unpacked."""
    return model(torch.tensor([PROMPT + answer]))[0, -1, 0]


def test_pairs_by_hand():
    """Prompt [1 5 6] and answers [20 8], [30 31 8]: the prompt once, the last tokens read, one place learnt in each."""
    batch = ScoredRows(encoded(chosen=[[1, 5, 6, 20, 8]], rejected=[[1, 5, 6, 30, 31, 8]], prompt=[3]), 6, 3).collate(
        [0]
    )
    assert batch.input_ids.tolist() == [[1, 5, 6, 20, 8, 6, 30, 31, 8, 3, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.segment.tolist() == [[-1, -1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1]]
    assert batch.learnt.tolist() == [4, 8]
    assert (batch.real_tokens, batch.supervised, batch.n_pairs, batch.n_answers) == (9, 2, 1, 2)


def test_scores_of_packed_answers_are_those_of_the_answers_alone(make_model):
    model = make_model(scores=True)
    batch = rows().collate([1, EMPTY_ROW, 0])
    scores = by_answer(ask(model, batch).score, batch)
    expected = [[score_alone(model, answers[i]).item() for answers in (CHOSEN, REJECTED)] for i in batch.pair_ids]
    assert torch.tensor(expected).std() > 0.5
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_loss_is_bradley_and_terrys_and_its_gradient(make_model, center):
    model = make_model(scores=True)
    batch = rows().collate([0, 1])
    loss, sums = BradleyTerry(center)(ask(model, batch), batch)
    both = [(score_alone(model, w), score_alone(model, v)) for w, v in zip(CHOSEN, REJECTED, strict=True)]
    # P(w before v) = e^s(w) / (e^s(w) + e^s(v)), as Bradley and Terry write it
    plain = sum(-torch.log(w.exp() / (w.exp() + v.exp())) + center * (w + v) ** 2 for w, v in both)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert relative(gradient(loss, model), gradient(plain, model)) < 1e-5
    objective, means = BradleyTerry(), {"chosen": 0.0, "rejected": 0.0}
    for w, v in both:
        means = {"chosen": means["chosen"] + w.item() / 4, "rejected": means["rejected"] + v.item() / 4}
    found = objective.metrics({name: float(value) for name, value in sums.items()}, objective.weight(batch))
    assert found["reward_margin"] == pytest.approx(means["chosen"] - means["rejected"], rel=1e-4)
    assert found["reward_accuracy"] == sum(w > v for w, v in both) / 4


def test_padding_alone_is_nothing(make_model):
    model, batch = make_model(scores=True), rows().collate([EMPTY_ROW])
    loss, _ = BradleyTerry(0.1)(ask(model, batch), batch)
    assert loss.item() == 0 and BradleyTerry().weight(batch) == 0 and not gradient(loss, model).any()


def test_rows_have_room_for_the_token_that_is_read_last(tokenizer):
    """A pair of answers as long as the context: all of it is read, and one token more is cut."""
    messages = [{"role": "user", "content": "Say a."}]
    row = {side: [*messages, {"role": "assistant", "content": text * 40}] for side, text in
           (("chosen", "a b "), ("rejected", "c d "))}  # fmt: skip
    whole = len(SCORED.side(row["chosen"], tokenizer))
    for length, cut in ((whole, 0), (whole - 1, 1)):
        report = Report()
        tokens = SCORED.encode(row, tokenizer, length, report)
        assert tokens is not None and report.cut["inside an answer"] == cut
        columns = {name: [tokens.columns[name]] for name in ("chosen", "rejected", "prompt")}
        batch = ScoredRows(encoded(**columns), length, tokenizer.pad_id).collate([0])
        assert batch.input_ids.shape == (1, 2 * length) and int(batch.position_ids.max()) == length - 1
        last = batch.input_ids.flatten()[batch.learnt]
        assert [int(i) in tokenizer.stop_ids for i in last] == [not cut] * 2


def test_scores_count_in_full_precision(make_model):
    """Under autocast hidden states have 8 bits; the product with the head is made in 24."""
    model = make_model(scores=True)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = model.score.weight.detach().bfloat16()
    places = Places(hidden, weight, torch.zeros(5, dtype=torch.long), torch.arange(5), torch.Size((1, 5)), None)
    expected = hidden.double() @ weight.double().T
    np.testing.assert_allclose(score_by_place(places)[2][0].numpy(), expected[:, 0].numpy(), rtol=1e-5)


@pytest.mark.parametrize("scores", [True, False])
def test_a_network_returns_no_views(make_model, scores):
    """FSDP hangs its hooks on what it returns, and warns of views."""
    ids = torch.arange(6).reshape(2, 3)
    said = make_model(scores=scores)(ids, labels=ids, criterion=score_by_place if scores else nll_by_place)
    assert said[-1].shape == (2, 3) and said[-1].requires_grad and said[-1]._base is None


# The stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    train_start(folder)
    train_here("reward", *stage_flags(folder, "reward", folder / "out"), "--max_steps", 4, "--eval_interval", 2)
    return folder


def test_it_starts_from_the_fine_tuned_body_and_leaves_a_folder_that_scores(base):
    folder = base / "out/reward_32"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert not (folder / "generation_config.json").exists()
    assert load_config(folder).scores and load_pretrained(folder).head_weight.shape == (1, 32)
    record = metrics(base / "out", "reward")[-1]
    assert {"reward_margin", "reward_accuracy", "val_reward_accuracy", "val_loss", "pairs_per_second"} <= record.keys()
    # first scores are near nothing, so the first loss is that of a coin
    assert metrics(base / "out", "reward")[0]["loss"] == pytest.approx(math.log(2), abs=0.3)


def test_a_reward_model_is_gone_on_with_by_its_own_stage_alone(base):
    again = [*stage_flags(base, "reward", base / "again"), "--init_from", base / "out/reward_32", "--max_steps", 1]
    train_here("reward", *again)
    with pytest.raises(ValueError, match="is a reward model: it scores answers and writes none"):
        train_here("dpo", *stage_flags(base, "dpo", base / "no"), "--init_from", base / "out/reward_32")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter_learns_the_head_beside_it(base, tmp_path, kind):
    """From a model that writes, and then from the adapter itself: a step further, on the same head."""
    flags = [*stage_flags(base, "reward", tmp_path / "out"), "--adapter", kind]
    train_here("reward", *flags, "--max_steps", 2)
    folder = tmp_path / "out/reward_32"
    ids = torch.arange(20)[None]
    first = load_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.get_tensor("base_model.model.score.weight").shape == (1, 32)
    if kind == "lora":  # it merges, its head with it
        assert torch.equal(dict(folder_weights(folder))["score.weight"], first.score.weight)
    further = ["--init_from", folder, "--run_name", "further", "--learning_rate", "1e-9"]
    train_here("reward", *flags, *further, "--max_steps", 1)
    torch.testing.assert_close(load_pretrained(tmp_path / "out/further")(ids), first(ids), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="is a reward model: it scores answers and writes none"):
        train_here("dpo", *stage_flags(base, "dpo", base / "no"), "--init_from", folder)


def test_an_adapter_that_wrote_is_gone_on_with_by_one_that_scores(base, tmp_path):
    wrote = [*stage_flags(base, "full_sft", tmp_path / "out"), "--adapter", "lora", "--max_steps", 2]
    train_here("full_sft", *wrote, "--init_from", base / "start/full_sft_32", "--run_name", "wrote")
    flags = [*stage_flags(base, "reward", tmp_path / "out"), "--adapter", "lora", "--max_steps", 1]
    train_here("reward", *flags, "--init_from", tmp_path / "out/wrote", "--learning_rate", "1e-9")
    made, before = load_pretrained(tmp_path / "out/reward_32"), load_pretrained(tmp_path / "out/wrote")
    torch.testing.assert_close(body_of(made), body_of(before), atol=1e-6, rtol=0)
    assert made.config.scores and base_folder(tmp_path / "out/reward_32") == base / "start/full_sft_32"


def body_of(model) -> dict[str, torch.Tensor]:
    return dict(body(model.state_dict().items()))


@pytest.mark.parametrize("flag", [("--sample_interval", "5"), ("--eval_answers", "4")])
def test_flags_of_a_model_that_writes_are_refused(flag):
    with pytest.raises(ValueError, match=f"{flag[0]} is {flag[1]}, and a reward model"):
        config_of(RewardConfig, [*flag])
    assert config_of(SFTConfig, [*flag])


def test_a_network_that_is_untied_gives_up_its_vocabularys_head(tmp_path, make_model, tokenizer):
    from model import save_pretrained

    data = make_data(tmp_path)
    save_pretrained(make_model(tie_embeddings=False, vocab_size=6400), tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    flags = [
        "--init_from",
        tmp_path / "start",
        "--data_path",
        data["dpo"],
        "--out_dir",
        tmp_path / "out",
        "--max_steps",
        1,
    ]
    train_here("reward", *flags, "--cache_dir", tmp_path / "cache", "--device", "cpu", "--dtype", "float32")
    made = load_pretrained(tmp_path / "out/reward_32")
    assert made.lm_head is None and made.score is not None


def test_a_run_that_knows_its_rows_by_heart_is_told():
    record = {"step": 9, "loss": 0.02, "val_loss": 0.9}
    assert "learnt by heart" in BradleyTerry().warnings(record)[0]
    assert BradleyTerry().warnings(record | {"val_loss": 0.3}) == BradleyTerry().warnings(record | {"loss": 0.6}) == []
