"""lm-evaluation-harness, on a folder of ours and the tasks that scripts/lm_eval_tasks.py writes, finds what we find."""

from pathlib import Path
from typing import Any

import pytest

from dataset import Tokenizer, load_tokenizer
from evaluation.benchmark import How, Outcome, Run, judge_files
from model import GPT, GPTConfig, load_pretrained, save_pretrained
from scripts import lm_eval_tasks
from tests.conftest import spread_weights
from tests.evaluation.questions import write_questions

lm_eval = pytest.importorskip("lm_eval")
COUNT, WRITTEN = 40, 6
Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Samples, Run]:
    """A tiny model with spread weights, asked 40 items of every kind by both; its context is too short for some."""
    import datasets
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm_eval")
    model = GPT(GPTConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=80))
    spread_weights(model)
    save_pretrained(model, folder / "model")
    tokenizer.save(folder / "model")
    files = write_questions(folder / "files", count=COUNT)
    sizes = ["--max_new_tokens", str(WRITTEN)]
    assert lm_eval_tasks.main([*map(str, files.values()), "--out", str(folder / "tasks"), *sizes]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        theirs = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder / "model"), "dtype": "float32"}, device="cpu",
            tasks=[f"seedling_{name}" for name in files], batch_size=16, log_samples=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        )  # fmt: skip
    how = How(max_new_tokens=WRITTEN)
    ours = judge_files(load_pretrained(folder / "model"), load_tokenizer(folder / "model"), list(files.values()), how)
    return theirs["samples"], ours


def paired(both: tuple[Samples, Run], task: str) -> list[tuple[dict[str, Any], Outcome]]:
    samples, run = both
    ours = {each.id: each for each in run.outcomes if each.task == task}
    found = [(sample, ours[sample["doc"]["id"]]) for sample in samples[f"seedling_{task}"]]
    assert len(found) == COUNT
    return found


@pytest.mark.parametrize("task", ["pick", "zh_pick", "copa", "fill", "last"])
def test_every_item_has_the_same_log_likelihoods_and_is_judged_alike(both: tuple[Samples, Run], task: str) -> None:
    for theirs, ours in paired(both, task):
        assert ours.loglikelihoods == pytest.approx([float(nats) for ((nats, _),) in theirs["resps"]], abs=1e-3)
        assert ours.right == bool(theirs["acc"])
        if "acc_norm" in theirs:
            assert ours.right_by_length == bool(theirs["acc_norm"])
    assert ("acc_norm" in theirs) == (task in ("pick", "zh_pick", "copa"))


def test_written_answers_are_the_same_texts(both: tuple[Samples, Run]) -> None:
    for theirs, ours in paired(both, "sum"):
        assert ours.written is not None and ours.written.strip() == theirs["resps"][0][0].strip()


def test_some_items_were_cut(both: tuple[Samples, Run]) -> None:
    assert 0 < sum(both[1].counts.values()) < COUNT


def test_a_file_of_two_tasks_is_no_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_questions(tmp_path, count=2)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files["last"].read_text() + files["sum"].read_text().replace('"id": "q', '"id": "r'))
    assert lm_eval_tasks.main([str(mixed), "--out", str(tmp_path)]) == 2
    assert "mixed.jsonl: found items of several forms" in capsys.readouterr().err
