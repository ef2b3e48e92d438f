"""What a run leaves behind, read back with the readers of others: JSON, Pillow, wandb's file format, TensorBoard."""

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch

from training import metrics as module
from training.metrics import Metrics, known_peak, measured_peak, peak_flops, peak_memory_mb

ROOT = Path(__file__).parents[2]


def record(step: int, **more) -> dict:
    return {"step": step, "epoch": step / 100, "loss": 5 - step / 100, "lr": 1e-3, "tokens_per_second": 1e4} | more


def run(folder: Path, steps, start_step: int = 0, total_steps: int = 100, **settings) -> None:
    with Metrics(
        folder, {"dim": 64}, stage="pretrain", total_steps=total_steps, start_step=start_step, **settings
    ) as metrics:
        for step in steps:
            metrics.log(record(step))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_on_disk_before_the_run_ends(tmp_path):
    metrics = Metrics(tmp_path, {}, stage="pretrain", total_steps=10)
    metrics.log(record(1, val_loss=4.5))
    assert lines(tmp_path) == [record(1, val_loss=4.5)]
    metrics.close()


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path, capsys):
    with Metrics(tmp_path, {}, stage="pretrain", total_steps=10) as metrics:
        metrics.log(record(1, loss=math.nan, grad_norm=torch.tensor(math.inf), val_loss=torch.tensor(2.5)))
    text = (tmp_path / "metrics.jsonl").read_text()
    (found,) = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in text.splitlines()
    ]
    assert (found["loss"], found["grad_norm"], found["val_loss"]) == (None, None, 2.5)
    assert "loss not finite" in capsys.readouterr().err


def test_resuming_removes_later_steps_and_a_torn_line(tmp_path):
    run(tmp_path, range(10, 60, 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    run(tmp_path, [40, 50], start_step=30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50]


def test_a_new_run_replaces_the_old_file(tmp_path):
    run(tmp_path, [10, 20])
    run(tmp_path, [5])
    assert [line["step"] for line in lines(tmp_path)] == [5]


def test_disabled_metrics_leave_nothing(tmp_path, capfd):
    metrics = Metrics(tmp_path / "run", {}, stage="pretrain", total_steps=10, enabled=False, use_wandb=True)
    metrics.log(record(1))
    metrics.advance(2)
    metrics.print("text")
    metrics.sample(2, "prompt", "text")
    metrics.close()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def full_disk():
    """full_disk(bytes): the system takes no file beyond so many bytes, and says so as it does of a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_line_is_told_once_and_training_goes_on(tmp_path, capsys, full_disk):
    with Metrics(tmp_path, {}, stage="pretrain", total_steps=10) as metrics:
        metrics.log(record(1))
        full_disk((tmp_path / "metrics.jsonl").stat().st_size + 20)  # takes a part of the next line
        for step in (2, 3):
            metrics.log(record(step))
        full_disk(1 << 30)
        metrics.log(record(4))
    assert lines(tmp_path) == [record(step) for step in (1, 2, 3, 4)]  # none is torn, none is lost
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == ["warning: metrics.jsonl could not be written: File too large; training goes on"]
    assert (tmp_path / "loss.png").is_file()


def test_a_terminal_log_on_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs a file that is always full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        run(tmp_path, [1, 2])
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()
    assert len(lines(tmp_path)) == 2


# What is seen ---------------------------------------------------------------------------------------------------


def test_one_plain_line_a_record_where_there_is_no_terminal(tmp_path, capsys):
    with Metrics(tmp_path, {}, stage="full_sft", total_steps=1000) as metrics:
        metrics.log(record(20, lr=5e-4, tokens_per_second=51234.0, mfu=0.031, memory_mb=812.4))
        metrics.advance(30)
        metrics.sample(30, "Hello", "World")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("full_sft step 20/1000, loss 4.8000, lr 5.0e-04, 51.2k tokens/s, MFU 3.1%, 812 MB, 00:0")
    assert shown[0].endswith(" left")
    assert shown[1:] == ["step 30, sample: Hello ▸ World"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_bar_where_there_is_a_terminal(tmp_path):
    import fcntl
    import pty
    import termios

    program = """
import sys
import time
from pathlib import Path
from training.metrics import Metrics
with Metrics(Path(sys.argv[1]), {}, stage="dpo", total_steps=40, start_step=10) as metrics:
    metrics.log({"step": 20, "loss": 0.65, "lr": 1e-5, "reward_margin": 0.25, "reward_accuracy": 0.75})
    metrics.print("a line above")
    metrics.advance(40)
"""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, stderr=end, check=True, timeout=120)
    os.close(end)
    shown = b""
    try:
        while block := os.read(terminal, 1 << 16):
            shown += block
    except OSError:  # Linux says so at the end of a pseudo terminal
        pass
    text = shown.decode()
    assert "10/40" in text and "40/40" in text and "100%" in text
    assert "loss 0.6500, margin 0.250, accuracy 75.0%, lr 1.0e-05" in text
    assert "a line above" in text


def test_loss_png_is_drawn_also_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), Metrics(tmp_path, {}, stage="pretrain", total_steps=10) as metrics:
        for step in range(1, 6):
            metrics.log(record(step, **({"val_loss": 4.9} if step % 2 else {})))
        raise ZeroDivisionError
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape[0] > 400 and image.shape[1] > 800
    assert image[..., :3].std() > 0.05  # something is drawn on it


def test_the_rewards_of_dpo_get_a_panel(tmp_path):
    heights = []
    for name, more in (("pretrain", {}), ("dpo", {"reward_margin": 0.1, "reward_accuracy": 0.6})):
        module.draw([record(step, **more) for step in (1, 2, 3)], tmp_path / f"{name}.png", name)
        heights.append(matplotlib.image.imread(tmp_path / f"{name}.png").shape[0])
    assert heights[1] > heights[0]


def test_a_picture_that_cannot_be_drawn_is_told_and_hides_nothing(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    run(tmp_path, [1])
    assert "loss.png could not be drawn" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 1


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert module.smooth([2.0] * 200) == pytest.approx([2.0] * 200)
    noisy = [1.0, 3.0] * 200
    assert module.smooth(noisy)[0] == pytest.approx(1.0)
    assert abs(module.smooth(noisy)[-1] - 2.0) < 0.2


# wandb ----------------------------------------------------------------------------------------------------------


def wandb_records(folder: Path) -> list:
    """All records of the wandb runs kept under a run folder, oldest run first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        limit = time.monotonic() + 60
        # wandb's own process may still be writing when finish() comes back; the record of the end is the last
        while not (records := read_wandb_file(path)) or records[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < limit, f"{path} was never finished"
            time.sleep(0.05)
        found += records
    return found


def read_wandb_file(path: Path) -> list:
    """The records of a .wandb file, a LevelDB log: a header of 7 bytes, then blocks of 32 KiB of pieces.

    A piece is a checksum (4 bytes), a length (2), a kind (1 whole, 2 first, 3 middle, 4 last) and its bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, place, joined, records = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while place + 7 <= len(data):
        if (room := 2**15 - place % 2**15) < 7:
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        joined += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):
            records.append(wandb_internal_pb2.Record.FromString(joined))
            joined = b""
    return records


def wandb_history(folder: Path) -> list[dict]:
    """One dict a logged step; the keys of media are dotted."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.history.item}
        for found in wandb_records(folder)
        if found.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_gets_config_values_and_samples(tmp_path, offline):
    folder = tmp_path / "pretrain_64"
    with Metrics(folder, {"dim": 64}, stage="pretrain", total_steps=9, use_wandb=True, wandb_project="p") as metrics:
        metrics.log(record(3, val_loss=4.5))
        metrics.sample(3, "Once <b>", "upon")
        metrics.log(record(6, loss=math.nan))
    found = [r.run for r in wandb_records(folder) if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in found[0].config.update}
    assert (found[0].project, found[0].display_name, config["dim"]) == ("p", "pretrain_64", 64)
    first, second = wandb_history(folder)
    assert {k: first[k] for k in ("_step", "loss", "lr", "val_loss")} == {
        "_step": 3,
        "loss": 4.97,
        "lr": 1e-3,
        "val_loss": 4.5,
    }
    assert (second["_step"], "loss" in second) == (6, False)
    (page,) = folder.glob("wandb/offline-run-*/files/media/html/sample*.html")
    assert "Once &lt;b&gt;" in page.read_text() and "upon" in page.read_text()


def test_a_resumed_run_is_the_same_wandb_run_and_sends_no_step_twice(tmp_path, offline):
    run(tmp_path, [10, 20, 30], use_wandb=True)
    name = (tmp_path / "wandb_run_id").read_text()
    run(tmp_path, [20, 30, 40], start_step=10, use_wandb=True)
    assert (tmp_path / "wandb_run_id").read_text() == name
    ids = [r.run.run_id for r in wandb_records(tmp_path) if r.WhichOneof("record_type") == "run"]
    assert len(ids) == 2 and set(ids) == {name.strip()}
    assert [line["_step"] for line in wandb_history(tmp_path)] == [10, 20, 30, 40]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40]


def test_a_new_run_is_a_new_wandb_run(tmp_path, offline):
    run(tmp_path, [10], use_wandb=True)
    name = (tmp_path / "wandb_run_id").read_text()
    run(tmp_path, [10], use_wandb=True)
    assert (tmp_path / "wandb_run_id").read_text() != name
    assert [line["_step"] for line in wandb_history(tmp_path)] == [10, 10]


@pytest.mark.parametrize(("raised", "code"), [(None, 0), (ValueError, 1)])
def test_wandb_is_told_how_the_run_ended(tmp_path, offline, raised, code):
    try:
        with Metrics(tmp_path, {}, stage="pretrain", total_steps=9, use_wandb=True) as metrics:
            metrics.log(record(1))
            if raised:
                raise raised
    except ValueError:
        pass
    assert [r.exit.exit_code for r in wandb_records(tmp_path) if r.WhichOneof("record_type") == "exit"] == [code]


def test_wandb_that_fails_on_the_way_is_told_once_and_training_goes_on(tmp_path, offline, capsys):
    with Metrics(tmp_path, {}, stage="pretrain", total_steps=9, use_wandb=True) as metrics:
        metrics.wandb.finish()  # takes nothing from here on
        for step in (1, 2):
            metrics.log(record(step))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 1 and told[0].startswith("warning: wandb could not be written: UsageError: ")
    assert len(lines(tmp_path)) == 2


def test_wandb_without_a_login_says_how_to_go_on(tmp_path, offline):
    run(tmp_path / "run", [10])
    program = """
import sys
import time
from pathlib import Path
from training.metrics import Metrics
try:
    Metrics(Path(sys.argv[1]), {}, stage="pretrain", total_steps=9, use_wandb=True)
except ValueError as error:
    print(error)
"""
    # a home without a stored login, and a server that nobody could reach by accident
    environment = os.environ | {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "WANDB_MODE=offline" in done.stdout and "leave --use_wandb out" in done.stdout, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run")] == [10]  # what an earlier run left is still there


# TensorBoard ----------------------------------------------------------------------------------------------------


def tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_shows_every_step_once_after_resuming(tmp_path):
    run(tmp_path, [10, 20, 30], use_tensorboard=True)
    run(tmp_path, [20, 40], start_step=10, use_tensorboard=True)
    assert tensorboard_scalars(tmp_path, "loss") == [(10, 4.9), (20, 4.8), (40, 4.6)]


def test_a_new_run_hides_the_old_one_in_tensorboard(tmp_path):
    run(tmp_path, [10, 20], use_tensorboard=True)
    run(tmp_path, [10], use_tensorboard=True)
    assert tensorboard_scalars(tmp_path, "loss") == [(10, 4.9)]


# Memory and speed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA GB200", torch.bfloat16, None),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
    ],
)
def test_peaks_go_by_the_name_of_the_whole_card(name, dtype, tera):
    assert known_peak(name, dtype) == (None if tera is None else tera * 1e12)


def test_an_unknown_device_is_measured_and_remembered():
    peak = peak_flops("cpu", torch.float32)
    assert 1e8 < peak < 1e15
    assert peak_flops("cpu", torch.float32) == peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_table_is_not_below_what_the_gpu_does():
    device = torch.device("cuda")
    assert measured_peak(device, torch.bfloat16) < 1.1 * peak_flops(device, torch.bfloat16)
    torch.ones(2**20, device=device)
    assert peak_memory_mb(device) >= 4


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mb("cpu")
    held = torch.ones(100 * 2**18)  # 100 MiB
    assert peak_memory_mb("cpu") >= max(before, held.numel() * 4 / 2**20)
