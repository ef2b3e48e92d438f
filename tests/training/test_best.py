"""The best model so far: what is a gain, what is kept of it, and what is said."""

import json
import math

import pytest
import torch

import eval_model
from dataset import load_tokenizer
from model import load_pretrained
from tests.helpers import make_data, metrics, stage_flags, train_here
from training import DPO, PretrainConfig
from training.best import Best, check_keep_best
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.objectives import DPOConfig
from training.saver import Progress


@pytest.fixture
def make_best(make_model, tokenizer, tmp_path):
    """make_best(metric, told, progress, **flags) -> Best of a run in tmp_path/pretrain_32."""

    def make(metric="val_loss", told=None, progress=None, **flags) -> Best:
        config = PretrainConfig(out_dir=str(tmp_path), dim=32, keep_best=metric, **flags)
        engine = SingleEngine(make_model(n_layers=1), config, Machine(World(), torch.device("cpu"), torch.float32))
        return Best(engine, config, tokenizer, progress or Progress(), ([] if told is None else told).append)

    return make


@pytest.mark.parametrize(
    ("metric", "values", "gains"),
    [
        ("val_loss", [3.0, 3.5, 2.5, 2.5, math.nan, 2.0], [1, 3, 6]),
        ("val_bpb", [math.nan, math.inf, 1.5, 1.0], [3, 4]),
        ("val_reward_accuracy", [0.5, 0.4, 0.6, math.nan], [1, 3]),
        ("val_reward_margin", [-1.0, -2.0, 0.0], [1, 3]),
    ],
)
def test_a_gain_is_more_of_accuracies_and_margins_and_less_of_the_rest(make_best, metric, values, gains):
    best = make_best(metric)
    steps = []
    for step, value in enumerate(values, 1):
        best.see({"step": step, metric: value})
        if best.progress.best_step == step:
            steps.append(step)
        assert best.progress.waited == (step - steps[-1] if steps else step)
    assert steps == gains and best.progress.best_value == values[gains[-1] - 1]


def test_the_best_model_is_kept_whole_with_its_step_and_value(make_best, tmp_path):
    told: list[str] = []
    best, folder = make_best(told=told), tmp_path / "pretrain_32/best"
    for step, value in enumerate([3.0, 2.0, 2.5], 1):
        for parameter in best.engine.model.parameters():
            parameter.data.fill_(step)
        best.see({"step": step, "val_loss": value, "loss": 9.0})
    assert all((weight == 2).all() for weight in load_pretrained(folder).state_dict().values())
    assert load_tokenizer(folder).fingerprint == best.tokenizer.fingerprint
    assert json.loads((folder / "best.json").read_text()) == {"metric": "val_loss", "step": 2, "value": 2.0}
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert told == [f"val_loss {v:.4f} of step {s} is the best so far: kept in {folder}" for s, v in ((1, 3), (2, 2))]


def test_a_best_model_that_cannot_be_written_is_told_and_the_next_is_tried(make_best, tmp_path):
    told: list[str] = []
    best, in_the_way = make_best(told=told), tmp_path / "pretrain_32/.best.part"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file where a folder has to be")
    best.see({"step": 1, "val_loss": 2.0})
    assert told[0].startswith(f"warning: the best model so far could not be written to {tmp_path}/pretrain_32/best: ")
    assert not best.kept and not best.over
    in_the_way.unlink()
    best.see({"step": 2, "val_loss": 2.5})
    assert best.kept and best.progress.best_step == 2


def test_patience_is_over_after_as_many_validations_without_a_gain(make_best):
    best = make_best(patience=2)
    over = []
    for step, value in enumerate([3.0, 3.5, 2.5, 2.5, 2.6], 1):
        best.see({"step": step, "val_loss": value})
        over.append(best.over)
    assert over == [False, False, False, False, True]
    assert make_best(patience=2, progress=best.progress).over and not make_best(progress=best.progress).over
    other = make_best("val_bpb", patience=2, progress=best.progress)  # by another metric it begins anew
    assert not other.over and not other.kept
    other.see({"step": 6, "val_loss": 9.0, "val_bpb": 9.0})
    assert other.kept and (best.progress.best_metric, best.progress.best_value) == ("val_bpb", 9.0)


def test_nothing_is_kept_where_nobody_asked(make_best, tmp_path):
    make_best(None).see({"step": 1, "val_loss": 1.0})
    assert not (tmp_path / "pretrain_32").exists()


def test_preferences_may_be_kept_by_loss_accuracy_and_margin():
    for metric in ("val_loss", "val_reward_accuracy", "val_reward_margin"):
        check_keep_best(DPOConfig(keep_best=metric), DPO(), held_out=True)
    with pytest.raises(ValueError, match="by val_loss, val_reward_accuracy, val_reward_margin$"):
        check_keep_best(DPOConfig(keep_best="val_drift"), DPO(), held_out=True)


def test_the_next_stage_and_chat_start_from_the_best_model(tmp_path):
    make_data(tmp_path)
    flags = ["--max_steps", 3, "--eval_interval", 1, "--val_fraction", 0.2]
    train_here("pretrain", *stage_flags(tmp_path, "pretrain", tmp_path), *flags, "--keep_best", "val_bpb")
    best = tmp_path / "pretrain_32/best"
    found = json.loads((best / "best.json").read_text())
    assert found["value"] == min(record["val_bpb"] for record in metrics(tmp_path, "pretrain"))
    train_here("full_sft", *stage_flags(tmp_path, "full_sft", tmp_path), *flags, "--init_from", best)
    assert eval_model.main(["--model", str(best), "--prompt", "the red cat", "--max_new_tokens", "2"]) == 0
