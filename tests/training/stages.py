"""Run under torchrun by test_waits: what would wait within the updates of a pipeline's stages, as lines of JSON."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from model import GPT, GPTConfig
from tests.training.test_waits import waits_of
from training import PretrainConfig, build_engine, distributed
from training.distributed import World
from training.engines import Machine

CPU = torch.device("cpu")
WAYS: list[dict[str, Any]] = [
    {"engine": "ddp"},
    {"engine": "ddp", "pp_schedule": "zb"},
    {"engine": "ddp", "pp_schedule": "zbv"},
    {"engine": "fsdp"},
    {"engine": "fsdp", "pp_schedule": "interleaved"},
]
SHAPE = GPTConfig(vocab_size=64, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=16)

world = World.from_environment(pp=2)
distributed.start(world, CPU)
for way in WAYS:
    dtype = torch.float32 if way["engine"] == "fsdp" else torch.float16  # with and without a loss scaler
    with torch.device("meta"):
        model = GPT(SHAPE)
    weights = {name: torch.full(p.shape, 0.1) for name, p in model.named_parameters()}
    engine = build_engine(model, PretrainConfig(pp=2, **way), Machine(world, CPU, dtype), weights.items)
    for rank, waits in enumerate(engine.gather(sorted(waits_of(engine)))):
        if world.rank == 0:
            print(json.dumps({**way, "rank": rank, "waits": waits}), flush=True)
distributed.stop()
