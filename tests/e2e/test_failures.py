"""What a user sees, and keeps, when things go wrong: killed saves, full disks, flipped bits, broken files."""

import gzip
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import TINY, command, environment, losses, make_data, run_here, train_here


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    make_data(folder)
    return folder


def flags_of(base: Path, out: Path) -> list:
    data = ["--data_path", base / "pretrain.jsonl", "--cache_dir", base / "cache", "--out_dir", out]
    return [*data, "--dim", 32, "--batch_size", 2, "--log_interval", 1, "--epochs", 10, "--val_fraction", 0, *TINY]


def test_kill_9_during_a_save_loses_nothing_saved_before(base: Path, tmp_path: Path) -> None:
    flags = [*flags_of(base, tmp_path), "--max_steps", 500, "--save_interval", 1]
    process = subprocess.Popen(
        command("pretrain", *flags), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "pretrain_32" / "checkpoints"
    deadline = time.monotonic() + 120
    # the moment a third save is half written
    while time.monotonic() < deadline and not (
        len(list(checkpoints.glob("step_*/COMPLETE"))) >= 2 and list(checkpoints.glob(".step_*.part/state/*"))
    ):
        time.sleep(0.001)
    process.kill()
    process.wait()
    newest = max(int(path.parent.name.removeprefix("step_")) for path in checkpoints.glob("step_*/COMPLETE"))
    assert newest >= 2
    done = run_here("pretrain", *flags_of(base, tmp_path), "--max_steps", newest + 3)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {checkpoints}/step_{newest:06d}" in done.stdout + done.stderr
    assert sorted(losses(tmp_path, "pretrain")) == list(range(1, newest + 4))
    assert not list(checkpoints.glob(".step_*"))  # the half-written one is gone


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    train_here("pretrain", *flags_of(base, tmp_path), "--max_steps", 6, "--save_interval", 2)
    checkpoints = tmp_path / "pretrain_32" / "checkpoints"
    state = max((checkpoints / "step_000006" / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    capfd.readouterr()
    train_here("pretrain", *flags_of(base, tmp_path), "--max_steps", 8)
    said = "".join(capfd.readouterr())
    assert "step_000006 is not used" in said and "damaged" in said
    assert f"resumed from {checkpoints}/step_000004" in said
    assert sorted(losses(tmp_path, "pretrain")) == list(range(1, 9))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 6 MB file system; a tiny run's checkpoint is about 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_costs_only_the_new_checkpoint(base: Path, small_disk: Path) -> None:
    flags = [*flags_of(base, small_disk), "--max_steps", 6, "--save_interval", 2, "--keep_last", 5]
    done = run_here("pretrain", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stdout + done.stderr
    assert "could not be saved" in said and "earlier checkpoints are untouched" in said and "No space left" in said
    checkpoints = small_disk / "pretrain_32" / "checkpoints"
    assert (checkpoints / "step_000002" / "COMPLETE").is_file()
    assert not list(checkpoints.glob(".step_*"))
    # with room again, the same command goes on
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    done = run_here("pretrain", *flags)
    assert done.returncode == 0 and "resumed from" in done.stdout + done.stderr


BROKEN = {
    "truncated": (b'{"text": "whole"}\n{"text": "cut of', ":2: found broken JSON", "the line is cut short"),
    "other stage": (
        b'{"conversations": [{"role": "user", "content": "hi"}]}\n',
        ":1: found the keys 'conversations'",
        "train_full_sft.py",
    ),
    "empty": (b"", ":1: found an empty file", '{"text": "..."}'),
    "not UTF-8": ('{"text": "caf\u00e9"}'.encode("latin-1") + b"\n", ":1: found bytes that are not UTF-8", "0xe9"),
    "array": (b'[{"text": "a"}]\n', ":1: found a list", "one object a line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_is_one_clear_line(base: Path, tmp_path: Path, name: str) -> None:
    content, found, hint = BROKEN[name]
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError) as error:
        train_here("pretrain", *flags_of(base, tmp_path / "out"), "--data_path", path)
    assert f"{path}{found}" in str(error.value) and hint in str(error.value)


def test_a_row_of_three_megabytes_is_trained_on_like_any_other(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "long row " * 340_000 + '"}\n')
    train_here("pretrain", *flags_of(tmp_path, tmp_path / "out"), "--data_path", path, "--max_steps", 2)
    assert "100.0%" in capfd.readouterr().out
    assert len(losses(tmp_path / "out", "pretrain")) == 2


def test_the_stage_before_is_named_where_its_model_is_missing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrain_32 is not there: run train_pretrain.py first.*--init_from"):
        train_here("full_sft", "--data_path", base / "sft.jsonl", "--out_dir", tmp_path, "--dim", 32)


def test_a_non_finite_update_is_named_skipped_and_stops_the_run_with_its_state(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    train_here("pretrain", *flags_of(base, tmp_path / "good"), "--max_steps", 1)
    broken = tmp_path / "good" / "pretrain_32"
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"3 updates in a row were not finite.*the state is saved"):
        train_here("pretrain", *flags_of(base, tmp_path / "out"), "--init_from", broken, "--max_steps", 50)
    said = "".join(capfd.readouterr())
    assert "step 1: loss nan" in said and "update skipped (rank 0, packed rows [[" in said
    after = tmp_path / "out" / "pretrain_32"
    assert (after / "checkpoints" / "step_000003" / "COMPLETE").is_file()
    # skipped: nothing but the broken weight is not finite, and nothing moved
    for name, weight in load_file(after / "model.safetensors").items():
        assert torch.equal(weight.nan_to_num(), weights[name].nan_to_num()), name


def test_a_shape_that_contradicts_the_folder_is_an_error(base: Path, tmp_path: Path) -> None:
    train_here("pretrain", *flags_of(base, tmp_path), "--max_steps", 1)
    with pytest.raises(ValueError, match=r"--n_layers 7 contradicts .*, which has n_layers 2"):
        train_here("full_sft", "--data_path", base / "sft.jsonl", "--out_dir", tmp_path, "--dim", 32, "--n_layers", 7)
    shutil.rmtree(tmp_path / "pretrain_32")
