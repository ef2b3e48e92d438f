"""One writer at a time: a folder that another process holds is refused by its name, until that process is gone."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import make_data, train_here
from tests.training.test_loop import Documents, make_parts  # noqa: F401
from training.distributed import World
from training.loop import train
from training.run_folder import held, move_aside

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is a fork of this one")


class Alone:
    """The ranks of one process."""

    world = World()

    def sum_over_ranks(self, values):
        return values

    def gather(self, value):
        return [value]

    def barrier(self):
        pass


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """A process that holds the folder until it is killed."""
    ready, end = multiprocessing.Pipe()

    def hold() -> None:
        with held(Alone(), folder, 0, print):
            end.send("held")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    try:
        assert ready.poll(20) and ready.recv() == "held"
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_a_second_start_of_a_run_is_told_who_writes_there(make_parts, tmp_path):  # noqa: F811
    folder = tmp_path / "pretrain_32"
    folder.mkdir()
    with another_process(folder) as other:
        with pytest.raises(ValueError) as error:
            train(*make_parts(Documents(), resume="none"))
        said = str(error.value)
        assert said.startswith(f"{folder} is in use by another run (process {other} on {socket.gethostname()}, since ")
        assert "another --out_dir" in said
        assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.holder"]
    train(*make_parts(Documents()))  # death has released it
    train(*make_parts(Documents()))  # and so does the end of a run


def test_a_restart_waits_for_the_process_before_it_to_die(tmp_path):
    told: list[str] = []
    with another_process(tmp_path) as other:
        killer = threading.Timer(0.3, os.kill, (other, signal.SIGKILL))
        killer.start()
        with held(Alone(), tmp_path, 20, told.append):
            assert str(os.getpid()) in (tmp_path / ".lock.holder").read_text()
        killer.join()
    assert len(told) == 1 and told[0].startswith(f"waiting up to 20 s: {tmp_path} is in use by process {other}")


def test_a_run_that_failed_holds_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), held(Alone(), tmp_path, 0, print):
        raise ZeroDivisionError
    with held(Alone(), tmp_path, 0, print):
        pass


def test_what_holds_the_folder_is_not_moved_aside(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    with held(Alone(), folder, 0, print):
        assert move_aside(folder) == tmp_path / "run.1"
        assert move_aside(folder) is None
    assert [path.name for path in (tmp_path / "run.1").iterdir()] == ["checkpoints"]


def test_what_is_trained_over_keeps_its_files_and_config_yaml_does_not_say_none(tmp_path, capfd):
    data = make_data(tmp_path, rows=12)
    flags = ["--data_path", data["pretrain"], "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "out"]
    flags += ["--dim", 32, "--n_layers", 1, "--n_heads", 2, "--n_kv_heads", 1, "--max_seq_len", 32, "--val_fraction", 0]
    flags += ["--max_steps", 2, "--device", "cpu", "--dtype", "float32"]
    train_here("pretrain", *flags)
    train_here("pretrain", *flags, "--resume", "none")
    run, backup = tmp_path / "out/pretrain_32", tmp_path / "out/pretrain_32.1"
    assert f"starting over: what was in {run} is now in {backup}" in capfd.readouterr().out
    kept = {"checkpoints", "config.yaml", "metrics.jsonl", "model.safetensors", "tokenizer.json", "loss.png"}
    assert kept <= {path.name for path in backup.iterdir()}
    mark = run / "checkpoints/step_000002/COMPLETE"
    written = (mark.stat().st_ino, mark.stat().st_mtime_ns)
    train_here("pretrain", "--config", run / "config.yaml")
    assert (mark.stat().st_ino, mark.stat().st_mtime_ns) == written
    assert not backup.with_name("pretrain_32.2").exists()
