"""The launch lines users type, with real launchers."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.helpers import ROOT, TINY, environment, free_port, losses, make_data, run, train_here


def flags_of(folder: Path, out: Path) -> list[str]:
    data = make_data(folder)["pretrain"]
    flags = ["--data_path", data, "--cache_dir", folder / "cache", "--out_dir", out, "--dim", 32, "--max_steps", 4]
    return [str(flag) for flag in [*flags, "--batch_size", 2, "--log_interval", 1, *TINY]]


def test_the_deepspeed_launcher_starts_the_script_and_its_local_rank_is_accepted(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, tmp_path / "launched")
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    done = subprocess.run(
        [*launcher, str(ROOT / "train_pretrain.py"), *flags],
        env=environment(PATH=path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train_here(
        "pretrain",
        *[flag if flag != str(tmp_path / "launched") else str(tmp_path / "alone") for flag in flags],
        "--accumulation_steps",
        2,
    )
    a, b = (load_file(tmp_path / name / "pretrain_32" / "model.safetensors") for name in ("launched", "alone"))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 2e-5


def test_ranks_started_with_different_settings_are_told_so(tmp_path: Path) -> None:
    """Two processes by hand, as two nodes would be, one with another batch size."""
    flags = flags_of(tmp_path, tmp_path / "out")
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_pretrain.py"), *flags, "--batch_size", size],
            env=environment(
                RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, size in enumerate(["2", "3"])
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "rank 1 has batch_size 3 but rank 0 has 2" in err, err


def test_ranks_stay_equal_and_reduce_once_an_update(tmp_path: Path) -> None:
    """Two ranks, three accumulated micro-batches: counted all-reduces of gradients, and the largest difference after."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), str(ROOT / "tests/e2e/count_reductions.py")],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference 0.0" in done.stdout
    assert "reductions a bucket in 2 updates: 2" in done.stdout


def test_a_saved_config_runs_again_and_gives_the_same_losses(tmp_path: Path) -> None:
    flags = flags_of(tmp_path, tmp_path / "first")
    train_here("pretrain", *flags)
    run(
        "pretrain",
        "--config",
        tmp_path / "first" / "pretrain_32" / "config.yaml",
        "--out_dir",
        tmp_path / "second",
        OMP_NUM_THREADS="1",
    )
    assert losses(tmp_path / "second", "pretrain").keys() == losses(tmp_path / "first", "pretrain").keys()
    for step, loss in losses(tmp_path / "first", "pretrain").items():
        assert abs(losses(tmp_path / "second", "pretrain")[step] - loss) < 1e-5 * loss
