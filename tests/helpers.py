"""Runs the real entry scripts in real processes, on small data made here."""

import importlib
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from dataset import DEFAULT_TOKENIZER, FORMS, load_tokenizer
from model import GPT, GPTConfig, save_pretrained
from training import STAGES, load_config
from training import metrics as metrics_module

ROOT = Path(__file__).parent.parent
FORM_OF = {form.stage: form for form in FORMS}
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
PLAIN = ["--device", "cpu", "--dtype", "float32"]  # what `auto` picks depends on the machine
ADAMW = ["--optimizer", "adamw", "--learning_rate", "1e-3"]  # which every engine takes
TINY = ["--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "64", *ADAMW, *PLAIN]
KTO = ["--loss_type", "kto", "--run_name", "kto_32"]  # a loss with an update's own number and rows of its own form
ROLLOUTS = ["--group_size", "4", "--max_new_tokens", "12", "--eval_rows", "4"]
# DoRA and the control tokens are part of it: more that must be right at once
LORA = ["--adapter", "lora", "--lora_rank", "4", "--lora_dora", "--train_control_tokens"]
BOTTLENECK = ["--adapter", "bottleneck", "--bottleneck_size", "3"]
PREFIX = ["--adapter", "prefix", "--prefix_length", "3", "--train_control_tokens"]
WORDS = (
    "the", "a", "red", "blue", "small", "old", "cat", "dog", "fox", "bird", "sees", "likes", "finds", "near", "under",
    "house", "tree", "river", "and", "then", "again", "猫", "狗", "看见", "喜欢", "红色", "房子",
)  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_data(folder: Path, rows: int = 60, seed: int = 0) -> dict[str, Path]:
    """One small file a stage, and one of labelled answers and pairs, with answers of very different lengths (so that
    ranks get unequal supervised tokens)."""
    rng = random.Random(seed)
    text = [{"text": f"{i} {sentence(rng, 3, 60)}"} for i in range(rows)]
    chats, pairs, labelled = [], [], []
    for i in range(rows):
        question = {"role": "user", "content": f"{i} {sentence(rng, 1, 12)}?"}
        answers = [{"role": "assistant", "content": sentence(rng, 1, 25)} for _ in range(2)]
        chats.append({"conversations": [question, answers[0]]})
        pairs.append({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
        one = {"conversations": [question, answers[i % 3]], "label": i % 3 == 0} if i % 3 < 2 else pairs[-1]
        labelled.append(one)
    return {
        "pretrain": write_jsonl(folder / "pretrain.jsonl", text),
        "full_sft": write_jsonl(folder / "sft.jsonl", chats),
        "dpo": write_jsonl(folder / "dpo.jsonl", pairs),
        "distill": folder / "sft.jsonl",
        "kto": write_jsonl(folder / "kto.jsonl", labelled),
        "reward": folder / "dpo.jsonl",
        "grpo": folder / "sft.jsonl",
        "ppo": folder / "sft.jsonl",
    }


def run_on(cores: list[int]) -> None:
    """Keep this process, and those it starts from now on, to some cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@contextmanager
def all_cores() -> Iterator[None]:
    """Processes started in here may use every core, though a worker of xdist keeps to one."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | quiet | extra


def command(stage: str, *flags: Any) -> list[str]:
    return [sys.executable, str(ROOT / STAGES[stage].script), *map(str, flags)]


def run(
    stage: str, *flags: Any, check: bool = True, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run one entry script in a process of its own; a failure shows all it printed."""
    done = subprocess.run(
        command(stage, *flags),
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def launched(
    script: Path, *arguments: Any, ranks: int = 2, nodes: int = 1, deepspeed: bool = False, horovod: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun (one on each "node", all on this machine), the deepspeed launcher or horovodrun.

    What comes back is the first node's.
    """
    folder = Path(sys.executable).parent
    port = str(free_port())
    if deepspeed:
        launcher = [str(folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port]
    elif horovod:
        launcher = [str(folder / "horovodrun"), "--gloo", "-np", str(ranks), sys.executable]
    else:
        meet = [
            "--nnodes",
            str(nodes),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"localhost:{port}",
            "--rdzv_id",
            port,
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks // nodes), *meet]
    command = [*launcher, str(script), *map(str, arguments)]
    env = environment(PATH=f"{folder}:{os.environ['PATH']}")
    with all_cores():
        others = [
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(nodes - 1)
        ]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert all(other.wait(60) == 0 for other in others)
    return done


@contextmanager
def no_pictures() -> Iterator[None]:
    """Runs in here leave no loss.png, which takes longer than a few updates of a tiny model."""
    drawn, metrics_module.draw = metrics_module.draw, lambda *_, **__: None
    try:
        yield
    finally:
        metrics_module.draw = drawn


def train_many(folder: Path, runs: list[tuple[str, list[Any]]], ranks: int = 2, **how: Any) -> str:
    """Several runs of entry scripts (stage, flags), one after the other in the same processes; what they said."""
    plan = folder / f"runs-{free_port()}.json"
    plan.write_text(json.dumps([[stage, [str(flag) for flag in flags]] for stage, flags in runs]))
    done = launched(ROOT / "tests/train_many.py", plan, ranks=ranks, **how)
    return done.stdout + done.stderr


def train_here(stage: str, *flags: Any) -> None:
    """Run one entry script's main in this process, which saves the seconds that importing torch takes."""
    stage, flags = ("dpo", (*flags, *KTO)) if stage == "kto" else (stage, flags)
    tools = {name: (f"scripts.{name}", STAGES["pretrain"].config) for name in ("memory", "scaling")}  # flags of a stage
    stages = {name: (each.script.removesuffix(".py"), each.config) for name, each in STAGES.items()}
    module, config = (tools | stages)[stage]
    importlib.import_module(module).main(load_config(config, [str(flag) for flag in flags]))


def run_here(stage: str, *flags: Any) -> subprocess.CompletedProcess[str]:
    """Run one entry script as `python SCRIPT flags` would, in this process: what it said, and its exit status."""
    argv = command(stage, *flags)[1:]
    out, err, status = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, argv
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def train_start(folder: Path) -> None:
    """Data, a model of the two stages before, and a teacher, for `stage_flags` to start from."""
    data = make_data(folder)
    flags = ["--dim", 32, "--out_dir", folder / "start", "--cache_dir", folder / "cache", "--max_steps", 3, *PLAIN]
    train_here("pretrain", "--data_path", data["pretrain"], *flags, *TINY)
    train_here("full_sft", "--data_path", data["full_sft"], *flags)
    make_teacher(folder / "start/teacher")


def make_teacher(folder: Path, **shape: Any) -> Path:
    """A model folder whose weights are far from first ones, so that it is sure of what it says."""
    model = GPT(GPTConfig(**({"dim": 48, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64} | shape)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.1 * torch.randn(parameter.shape, generator=generator))
    save_pretrained(model, folder)
    load_tokenizer(DEFAULT_TOKENIZER).save(folder)
    return folder


def stage_flags(base: Path, stage: str, out: Path) -> list[Any]:
    """One stage (or kto, which is dpo's) on the data and starting model of `train_start(base)`, every step logged."""
    data = {"pretrain": "pretrain.jsonl", "dpo": "dpo.jsonl", "kto": "kto.jsonl", "reward": "dpo.jsonl"}
    start = {
        "pretrain": TINY,
        "full_sft": ["--init_from", base / "start/pretrain_32"],
        "dpo": ["--init_from", base / "start/full_sft_32"],
        "distill": ["--init_from", base / "start/pretrain_32", "--teacher", base / "start/teacher"],
        "kto": ["--init_from", base / "start/full_sft_32"],
        "reward": ["--init_from", base / "start/full_sft_32"],
        "grpo": ["--init_from", base / "start/full_sft_32", "--reward", "length:20", *ROLLOUTS],
        "ppo": ["--init_from", base / "start/full_sft_32", "--reward", "length:20", *ROLLOUTS],
    }[stage]
    folders = ["--data_path", base / data.get(stage, "sft.jsonl"), "--out_dir", out, "--cache_dir", base / "cache"]
    return [*folders, "--dim", 32, "--log_interval", 1, *PLAIN, *start]


def metrics(out_dir: Path, stage: str, dim: int = 32) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / f"{stage}_{dim}" / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir: Path, stage: str, dim: int = 32) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(out_dir, stage, dim)}
