"""Answers looked at while a preference is trained: told where they fall apart, and known after a resume."""

from pathlib import Path

import pytest
import torch

from dataset import Tokenizer, render_chat
from model import load_pretrained
from tests.conftest import spread_weights
from tests.helpers import PLAIN, make_data, metrics, train_here
from tests.memorised import CONVERSATIONS, make_memorised
from training import DPOConfig
from training.answers import Answers
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.saver import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_memorised(tmp_path_factory.mktemp("answers") / "full_sft_48")


def test_a_model_whose_answers_fall_apart_is_told_by_what_it_says(folder: Path, tokenizer: Tokenizer) -> None:
    machine = Machine(World(), torch.device("cpu"), torch.float32)
    engine = SingleEngine(load_pretrained(folder), DPOConfig(dim=48), machine)
    prompts = [render_chat(tokenizer, [talk[0]], add_generation_prompt=True).ids for talk in CONVERSATIONS[:2]]
    said: list[str] = []
    answers = Answers(engine, tokenizer, prompts, progress := Progress(), said.append)
    answers.begin()
    assert progress.answers["val_ended"] == progress.answers["val_no_loops"] == 1.0
    answers.warn({"step": 4} | answers.look())
    assert said == []
    spread_weights(engine.model)
    answers.warn({"step": 8} | answers.look())
    (line,) = said
    assert line.startswith("warning: answers to 2 held-out prompts fall apart at step 8: 0% end by themselves (100% at")
    assert "--nll_weight" in line
    answers.warn({"step": 9, "loss": 1.0})  # a line without a validation
    assert len(said) == 1


def test_without_open_prompts_nothing_is_asked(tokenizer: Tokenizer) -> None:
    answers = Answers(None, tokenizer, [], progress := Progress(), print)  # type: ignore[arg-type]
    answers.begin()
    assert answers.look() == {} and progress.answers == {}


def test_preference_runs_log_the_health_of_their_answers_and_remember_the_start(folder: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path)
    files = ["--data_path", data["dpo"], "--out_dir", tmp_path, "--cache_dir", tmp_path / "cache"]
    flags = [*files, "--init_from", folder, "--dim", 48, "--val_fraction", 0.2, "--eval_interval", 2, *PLAIN]
    steps = ["--lr_schedule", "wsd", "--warmup_steps", 0, "--batch_size", 1, "--log_interval", 1]
    train_here("dpo", *flags, *steps, "--max_steps", 2)
    train_here("dpo", *flags, *steps, "--max_steps", 4)
    records = metrics(tmp_path, "dpo", 48)
    looked_at = {"val_ended", "val_no_loops", "val_distinct_2", "val_answer_tokens"}
    assert [record["step"] for record in records if looked_at <= record.keys()] == [2, 4]
    runs = sorted((tmp_path / "dpo_48/checkpoints").glob("*/run.json"))
    starts = [path.read_text().split('"answers": {')[1].split("}")[0] for path in runs]
    assert len(starts) == 2 and starts[0] == starts[1] and "val_ended" in starts[0]
