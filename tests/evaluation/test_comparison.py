"""Two models on the same items: the interval of a paired difference, the exact test, and what is not paired."""

import json
import math
import random
from pathlib import Path

import pytest

import eval_model
from evaluation.benchmark import How, Outcome, Run, judge_files
from evaluation.comparison import Comparison, mcnemar, paired_interval, prompts_for, read_run
from model import load_pretrained
from tests.evaluation.questions import write_questions
from tests.helpers import make_teacher
from tests.memorised import make_memorised


def run_of(name: str, rights: dict[str, bool], **how: object) -> Run:
    outcomes = [Outcome(each, "t", "", "en", "cloze", "x", right, 0.0) for each, right in rights.items()]
    return Run(name, How()._asdict() | how, [], [], outcomes, {})


def test_differences_are_those_of_items_that_both_were_asked() -> None:
    a = run_of("a", {"1": True, "2": True, "3": False, "4": False, "only a": True})
    b = run_of("b", {"1": True, "2": False, "3": True, "4": True, "only b": False, "too": False}, shots=2)
    found = Comparison.of_runs(a, b)
    (each,) = found.differences
    assert (each.items, each.a, each.b, each.only_a, each.only_b, each.difference) == (4, 0.5, 0.75, 1, 2, 0.25)
    assert (each.low, each.high) == paired_interval(1, 2, 4) and each.p == 1
    assert found.notes == [
        "asked otherwise: shots is 0 of a, 2 of b",
        "left out, since one alone was asked: 1 items of a, 2 of b",
    ]
    with pytest.raises(ValueError, match="a and b have no item in common"):
        Comparison.of_runs(run_of("a", {"1": True}), run_of("b", {"2": True}))


def test_an_interval_of_a_difference_holds_the_true_one_about_19_times_in_20() -> None:
    """Of models that agree mostly, also where there are few items; and it is never without width."""
    rng = random.Random(0)
    for only_a, only_b, items in ((0.1, 0.1, 40), (0.05, 0.25, 40), (0.02, 0.04, 200)):
        held = 0
        for _ in range(2000):
            drawn = [rng.random() for _ in range(items)]
            counts = sum(x < only_a for x in drawn), sum(only_a <= x < only_a + only_b for x in drawn)
            low, high = paired_interval(*counts, items)
            held += low <= only_b - only_a <= high
        assert 0.93 < held / 2000 < 0.99, (only_a, only_b, items)
    low, high = paired_interval(0, 0, 20)
    assert -0.2 < low < 0 < high < 0.2


def test_the_exact_test_says_how_often_so_uneven_a_split_falls_to_equal_models() -> None:
    assert mcnemar(1, 9) == pytest.approx(22 / 1024) == mcnemar(9, 1)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == 2 / 32
    middle = mcnemar(2400, 2600)  # Gauss, with half an item's correction
    assert middle == pytest.approx(math.erfc(199 / math.sqrt(5000) / math.sqrt(2)), rel=0.01)


def test_two_folders_are_compared_on_files_and_prompts_and_kept(tmp_path: Path, capsys) -> None:
    """By eval_model.py: from the folders, and again from what a run left."""
    a, b = make_memorised(tmp_path / "full_sft_48"), make_teacher(tmp_path / "pretrain_48", max_seq_len=96)
    files = [str(path) for path in write_questions(tmp_path / "files").values()]
    here = ["--out_dir", str(tmp_path), "--max_new_tokens", "12", "--dtype", "float32"]
    both = ["--compare", "full_sft_48", "pretrain_48"]
    said = ["--prompt", "Who are you?", "你是谁？", "--out", str(tmp_path / "both"), "--json"]
    assert eval_model.main([*here, *both, "--raw", "--benchmark", *files, *said]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "both/comparison.json").read_text(encoding="utf-8"))
    assert kept["differences"] == printed["differences"] and len(kept["runs"][0]["outcomes"]) == 36
    assert [each["prompt"] for each in printed["answers"]] == ["Who are you?", "你是谁？"]
    assert (tmp_path / "both/benchmark.png").is_file()
    runs = []
    for folder in (a, b):
        assert eval_model.main([*here, "--model", str(folder), "--raw", "--benchmark", *files]) == 0
        runs.append(str(folder / "benchmark.json"))
    capsys.readouterr()
    assert eval_model.main(["--compare", *runs, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["differences"] == printed["differences"] and again["answers"] == []
    assert eval_model.main([*here, *both, "--prompt", "Who are you?"]) == 0
    assert "I am a seed. 🌱" in capsys.readouterr().out


def test_what_models_are_asked_by_default_is_in_their_form() -> None:
    assert prompts_for(True) != prompts_for(False)


def test_a_model_against_itself_differs_by_nothing(make_model, tokenizer, tmp_path: Path) -> None:
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=128)
    run = judge_files(model, tokenizer, list(write_questions(tmp_path).values()), How(max_new_tokens=4))
    found = Comparison.of_runs(run, run)
    assert {each.difference for each in found.differences} == {0.0}
    assert {(each.name, each.kind) for each in found.differences} >= {("all", "choice"), ("fill", "choice")}
    found.ask([(model, tokenizer, False)] * 2, ["red fox"], 5)
    assert found.answers[0]["a"] == found.answers[0]["b"] != ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--compare", "a.json", "b.json"], "a.json: no such file; expected a benchmark.json"),
        (["--compare", "a.json", "b.json", "--prompt", "x"], "a file of scores, which cannot be asked"),
        (["--compare", "a", "b", "--model", "c"], "--compare A B names both models"),
        (["--benchmark", "x.jsonl", "--prompt", "y"], "--benchmark and --prompt are two different things"),
        (["--benchmark", "x.jsonl", "--raw", "--chat"], "--raw and --chat say the opposite"),
        (["--shots", "2"], "--shots, --subjects and --out belong to --benchmark"),
        (["--score", "x.jsonl", "--benchmark", "y.jsonl"], "--score is one thing to do"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], told: str, capsys) -> None:
    assert eval_model.main(flags) == 2
    assert told in capsys.readouterr().err


def test_another_json_file_is_no_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"scores": [], "outcomes": [], "loss": 3}')
    with pytest.raises(ValueError, match=r"other.json: found no benchmark of eval_model.py"):
        read_run(str(path))


def test_the_folder_of_a_run_is_left_as_it_was(tmp_path: Path) -> None:
    """But for the two files that --benchmark names."""
    folder = make_teacher(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = write_questions(tmp_path / "files", count=2)
    assert eval_model.main(["--model", str(folder), "--benchmark", str(files["pick"])]) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"benchmark.json", "benchmark.png"}
    assert {name: after[name] for name in before} == before and load_pretrained(folder)
