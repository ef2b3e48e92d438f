"""Runs seen together: folders as the real writers leave them, the table from the terminal, the picture's pixels."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from scripts.plot_runs import differences, draw, main, read_runs
from training import GRPOConfig, SFTConfig, load_config
from training.config import save_config
from training.metrics import Metrics


def leave(out_dir: Path, name: str, *flags: object, slope: float = 0.01, config=SFTConfig, **more: float) -> Path:
    """What a run of 30 steps leaves."""
    found = load_config(config, ["--out_dir", str(out_dir), "--run_name", name, *map(str, flags)])
    with Metrics(found.run_dir, {}, stage=found.stage, total_steps=30) as metrics:
        for step in range(1, 31):
            record = {"step": step, "loss": 3 - slope * step, "lr": found.learning_rate, "tokens": 1200 * step}
            record |= {"tokens_per_second": 5000.0 + 100 * (step == 30), "seconds": 0.5 * step} | more
            metrics.log(record | ({"val_loss": 3.5 - slope * step} if step % 10 == 0 else {}))
    save_config(found, found.run_dir / "config.yaml")
    return found.run_dir


@pytest.fixture
def runs(tmp_path):
    return [
        leave(tmp_path, "plain", "--learning_rate", 5e-4),
        leave(tmp_path, "faster", "--learning_rate", 2e-3, "--batch_size", 8, slope=0.03),
    ]


def test_the_table_has_last_figures_and_the_flags_that_differ(runs, tmp_path, capsys):
    picture = tmp_path / "both.png"
    assert main(["plain", str(runs[1]), "--out_dir", str(tmp_path), "--output", str(picture)]) == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if len(row) == 3}
    assert rows["loss"] == ["2.7000", "2.1000"] and rows["val_loss"] == ["3.2000", "2.6000"]
    assert rows["tokens"] == ["36,000", "36,000"] and rows["tokens_per_second (median)"] == ["5,000", "5,000"]
    assert rows["learning_rate"] == ["0.0005", "0.002"] and rows["batch_size"] == ["16", "8"]
    assert set(rows).isdisjoint({"run_name", "seed", "reward", "out_dir"})
    assert picture.is_file()


def test_every_run_and_every_panel_is_in_the_picture(runs, tmp_path):
    both = tmp_path / "both.png"
    grpo = leave(tmp_path, "grpo", config=GRPOConfig, reward=0.5, pass_at_1=0.25, val_bpb=2.5)
    draw(read_runs(runs), both)
    draw(read_runs([*runs, grpo]), tmp_path / "three.png")
    image, taller = (matplotlib.image.imread(path) for path in (both, tmp_path / "three.png"))
    assert taller.shape[0] == image.shape[0] * 2  # loss, learning rate, speed; bits per byte, reward, pass@1 with them
    draw(read_runs([*runs, grpo]), tmp_path / "one.png", metrics=["bpb"])
    assert matplotlib.image.imread(tmp_path / "one.png").shape[0] == image.shape[0] // 3
    with pytest.raises(ValueError, match="no run has logged bpb; give others with --metrics"):
        draw(read_runs(runs), tmp_path / "none.png", metrics=["bpb"])
    colours = {tuple(colour) for colour in np.round(image[..., :3].reshape(-1, 3) * 255).astype(int).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours and (44, 160, 44) not in colours


@pytest.mark.parametrize("along", ["step", "tokens", "seconds"])
def test_curves_go_along_steps_tokens_or_seconds(runs, tmp_path, along):
    draw(read_runs(runs), tmp_path / f"{along}.png", along)
    assert (tmp_path / f"{along}.png").stat().st_size > 10_000


def test_one_run_has_no_flags_that_differ_and_equal_names_get_their_folder(runs, tmp_path):
    assert differences(read_runs(runs[:1])) == {}
    other = leave(tmp_path / "later", "plain")
    assert [run.name for run in read_runs([runs[0], other])] == [f"{tmp_path.name}/plain", "later/plain"]


def test_what_is_left_out_is_counted(runs, tmp_path, capsys):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "loss": None}) + "\n" + '{"step": 32, "lo')
    (run,) = read_runs(runs[:1])
    told = capsys.readouterr().err
    assert "1 of 32 lines are torn" in told and "1 of 31 lines have no finite loss" in told
    assert len(run.records) == 31 and not math.isnan(run.records[29]["loss"])


@pytest.mark.parametrize(
    ("gone", "expected"), [("metrics.jsonl", "metrics.jsonl is not there"), ("config.yaml", "config.yaml is not there")]
)
def test_a_folder_that_is_no_runs_is_one_line(runs, tmp_path, capsys, gone, expected):
    (runs[0] / gone).unlink()
    assert main([str(runs[0]), "--output", str(tmp_path / "x.png")]) == 2
    assert expected in capsys.readouterr().err
    assert main(["nowhere", "--out_dir", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err
    (runs[1] / "metrics.jsonl").write_text("")
    assert main([str(runs[1]), "--output", str(tmp_path / "x.png")]) == 2
    assert "no whole line yet" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
