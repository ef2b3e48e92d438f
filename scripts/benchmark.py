"""How fast does a stage train here? Its own flags in; real tokens a second beside this machine's matrix-product rate out.

python scripts/benchmark.py pretrain --data_path corpus.jsonl --dim 512 --n_layers 8 --dtype bfloat16 --max_steps 5

Real rows, the real engine, random weights, nothing saved. Real tokens are those that are not padding. One update is run
first and not counted. Compare only figures of one run: a shared machine is not equally fast twice.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dataset import Loader
from training import DPO, DPOConfig, NextToken, PretrainConfig, SFTConfig, build_engine
from training.config import Config
from training.metrics import flops_per_token, peak_memory_mb
from training.objectives import Objective
from training.setup import load_data, run_stage, start_machine, starting_model

STAGES: dict[str, type[Config]] = {"pretrain": PretrainConfig, "full_sft": SFTConfig, "dpo": DPOConfig}


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


def main(config: Config) -> None:
    machine = start_machine(config)
    model, weights, tokenizer, config = starting_model(replace(config, init_from="none", val_fraction=0.0))
    data = load_data(config, tokenizer, machine.world)
    objective: Objective = DPO(config.beta) if isinstance(config, DPOConfig) else NextToken()
    engine = build_engine(model, config, machine.device, machine.dtype, machine.world, weights)
    loader = Loader(
        data.train, config.batch_size, config.accumulation_steps, machine.world.rank, machine.world.size, config.seed,
        rows_per_update=config.global_batch_size,
    )  # fmt: skip
    last_start = max(1, len(data.train) - loader.rows_per_update + 1)
    steps = config.max_steps or 5
    tokens = weight = 0.0
    for step in range(steps + 1):
        if step == 1:
            wait(engine.device)
            began, tokens, weight = time.perf_counter(), 0.0, 0.0
        batches = loader.update(step * loader.rows_per_update % last_start)
        _, update_weight = engine.forward_backward(batches, objective)
        engine.step(config.learning_rate)
        tokens += sum(batch.real_tokens for batch in batches) * machine.world.size
        weight += update_weight
    wait(engine.device)
    seconds = time.perf_counter() - began
    if machine.world.rank == 0:
        print_result(
            config,
            engine.device,
            machine.dtype,
            tokens / seconds,
            weight / seconds,
            flops_per_token(engine.model.config, config.max_seq_len or 0),
        )


def print_result(
    config: Config, device: torch.device, dtype: torch.dtype, speed: float, weight: float, flops: float
) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rate = matmul_rate(device, dtype)
    print(
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {str(dtype).split('.')[1]}"
    )
    print(
        f"{config.stage}: dim {config.dim}, {config.n_layers} layers, rows of {config.max_seq_len}, {config.batch_size} x {config.accumulation_steps} rows an update"
    )
    print(f"  {speed:,.0f} real tokens/s" + (f", {weight:.2f} pairs/s" if config.stage == "dpo" else ""))
    print(
        f"  {flops / 1e6:.0f} MFLOP a token: {speed * flops / 1e9:.0f} GFLOP/s, beside {rate / 1e9:.0f} GFLOP/s of a 2048^3 matrix product: {speed * flops / rate:.1%}"
    )
    print(f"  peak memory {peak_memory_mb(device):,.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python scripts/benchmark.py {{{','.join(STAGES)}}} [flags of that stage]")
    run_stage(main, STAGES[sys.argv.pop(1)])
