"""Benchmarks while training and by eval_model.py: one process, and two ranks that share them."""

import json
from pathlib import Path
from typing import Any

import pytest

import eval_model
from evaluation.benchmark import How, Run, judge_files
from model import load_pretrained
from tests.evaluation.questions import write_questions
from tests.helpers import PLAIN, TINY, make_data, make_teacher, metrics, train_here, train_many
from training import PretrainConfig, RewardConfig, load_config

NAMES = ("pick", "copa", "last", "sum")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one process into `one`, and by two ranks into `two`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model, data = make_teacher(folder / "teacher", max_seq_len=128), make_data(folder)
    files = write_questions(folder / "files", count=11)

    def asked(out: str, *engine: Any) -> list[tuple[str, list[Any]]]:
        judged = [
            "--eval_benchmark",
            *(files[name] for name in NAMES),
            "--benchmark_interval",
            2,
            "--benchmark_rows",
            7,
        ]
        here = ["--data_path", data["pretrain"], "--out_dir", folder / out, "--cache_dir", folder / "cache"]
        steps = ["--max_steps", 3, "--global_batch_size", 8, "--log_interval", 3, "--eval_interval", 0]
        flags = [*here, "--dim", 32, *TINY, *steps, *judged, *engine]
        again = ["--model", model, "--benchmark", *files.values(), "--max_new_tokens", 8, "--batch_size", 2]
        return [("pretrain", flags), ("eval_model", [*again, "--out", folder / out, *PLAIN])]

    (_, flags), (_, again) = asked("one")
    train_here("pretrain", *flags)
    assert eval_model.main([str(flag) for flag in again]) == 0
    said = train_many(folder, asked("two", "--engine", "fsdp"), ranks=2)
    assert said.count("step 2, benchmarks: copa ") == 1 and said.count("┃ language") == 1  # of one rank
    return folder


def test_ranks_share_a_benchmark_and_find_the_same_to_the_last_byte(runs: Path) -> None:
    one, two = ((runs / name / "benchmark.json").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two and len(json.loads(one)["outcomes"]) == 66
    assert (runs / "two/benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert Run.from_json(json.loads(one), "one").to_json() == json.loads(one)


def test_training_logs_what_the_model_gets_right_at_its_interval_and_at_the_end(runs: Path, tokenizer) -> None:
    names = {"bench_copa", "bench_copa_by_length", "bench_last", "bench_last_perplexity", "bench_pick", "bench_sum"}
    one, two = metrics(runs / "one", "pretrain"), metrics(runs / "two", "pretrain")
    assert [record["step"] for record in one if names <= record.keys()] == [2, 3]
    files = [runs / f"files/{name}.jsonl" for name in NAMES]
    run = judge_files(load_pretrained(runs / "one/pretrain_32"), tokenizer, files, How(max_new_tokens=128, max_rows=7))
    for score in (each for each in run.scores if each.group == "task"):
        assert one[-1][f"bench_{score.name}"] == score.accuracy
        if score.perplexity:
            assert one[-1][f"bench_{score.name}_perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    for mine, theirs in zip(one, two, strict=True):  # a sharded model's weights differ in their last bits
        assert {name: mine[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-4)


def test_flags_that_ask_for_nothing_are_told() -> None:
    with pytest.raises(ValueError, match="--benchmark_interval 5 needs files: give --eval_benchmark FILES"):
        load_config(PretrainConfig, ["--benchmark_interval", "5"])
    with pytest.raises(ValueError, match="--eval_benchmark is .*, and a reward model writes nothing"):
        load_config(RewardConfig, ["--eval_benchmark", "a.jsonl"])
