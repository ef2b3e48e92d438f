"""How fast does a stage train here? Its flags in; real tokens a second beside this machine's matrix-product rate out.

python scripts/benchmark.py pretrain --data_path corpus.jsonl --dim 512 --n_layers 8 --dtype bfloat16 --max_steps 5

Real rows, the real engine, random weights, nothing saved. Real tokens are those that are not padding. One update is run
first and not counted. Compare only figures of one run: a shared machine is not equally fast twice.

The flags are those of the stage; --max_steps are the updates measured, by default 5. What is validated, saved and
reported does not count.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from dataset.loader import PairRows
from training import STAGES, build_engine
from training.config import Config
from training.engines import Machine, Totals
from training.metrics import peak_memory_mb
from training.setup import Start, load_data, run_stage, start_machine, starting_model
from training.transfer import Deferred


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 product, measured for about `seconds`."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    a @ b
    wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        wait(device)
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(asked: Config) -> None:
    machine = start_machine(asked)
    start = starting_model(replace(asked, init_from="none", val_fraction=0.0))
    data, config = load_data(start, machine), start.config
    for rows in (loader.rows for loader in data.parts):
        if isinstance(rows, PairRows):  # any numbers are as fast
            rows.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)
    objective = STAGES[config.stage].objective(config)
    engine = build_engine(start.model, config, machine, start.weights)
    last_start = max(1, data.train.rows_per_epoch - data.train.rows_per_update + 1)
    tokens = 0.0
    learnt: list[Deferred[Totals]] = []
    for step in range((config.max_steps or 5) + 1):
        if step == 1:
            wait(engine.device)
            began, tokens, learnt = time.perf_counter(), 0.0, []
        batches = data.train.update(step * data.train.rows_per_update % last_start)
        learnt.append(engine.forward_backward(batches, objective))
        engine.step(config.learning_rate)
        tokens += sum(batch.real_tokens for batch in batches) * machine.world.data_size
    wait(engine.device)
    seconds = time.perf_counter() - began
    weight = sum(totals.read().weight for totals in learnt)
    if machine.world.rank == 0:
        per_second = f", {weight / seconds:.2f} {objective.unit}/s" if objective.unit else ""
        print_result(start, machine, tokens / seconds, per_second)


def print_result(start: Start[Config], machine: Machine, speed: float, weighed: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    config, device, dtype = start.config, machine.device, machine.dtype
    flops, rate = start.model.config.flops_per_token(start.max_seq_len), matmul_rate(device, dtype)
    print(
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{str(dtype).split('.')[1]}"
    )
    print(
        f"{config.stage}: dim {config.dim}, {config.n_layers} layers, rows of {start.max_seq_len}, "
        f"{config.batch_size} x {config.accumulation_steps} rows an update"
    )
    print(f"  {speed:,.0f} real tokens/s{weighed}")
    print(
        f"  {flops / 1e6:.0f} MFLOP a token: {speed * flops / 1e9:.0f} GFLOP/s, beside {rate / 1e9:.0f} GFLOP/s of a "
        f"2048^3 matrix product: {speed * flops / rate:.1%}"
    )
    print(f"  peak memory {peak_memory_mb(device):,.0f} MB")


if __name__ == "__main__":
    usage = f"usage: python scripts/benchmark.py {{{','.join(STAGES)}}} [flags of that stage]"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{usage}\n\n{__doc__}\nA stage and --help list its flags: python scripts/benchmark.py dpo --help")
    elif len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"{usage}; --help says more")
    else:
        run_stage(main, STAGES[sys.argv.pop(1)].config, __doc__)
