"""Run under torchrun by test_launchers: two updates of three micro-batches on two ranks, gradient reductions counted."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from dataset.batch import Batch
from model import GPT, GPTConfig
from training import NextToken, PretrainConfig, build_engine
from training.distributed import World, start

world = World.from_environment()
device = torch.device("cpu")
start(world, device)
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=16))
engine = build_engine(model, PretrainConfig(dim=16), device, torch.float32, world)
calls: dict[int, int] = {}


def counting_hook(state, bucket):
    calls[bucket.index()] = calls.get(bucket.index(), 0) + 1
    return allreduce_hook(state, bucket)


engine.network.register_comm_hook(None, counting_hook)
torch.manual_seed(world.rank)
for _ in range(2):
    batches = []
    for _ in range(3):
        ids = torch.randint(0, 50, (2, 16))
        batches.append(Batch(ids, ids.roll(-1, 1), torch.arange(16).expand(2, 16), [0, 1], 32, 32))
    engine.forward_backward(batches, NextToken())
    engine.step(1e-2)
flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
low, high = flat.clone(), flat.clone()
dist.all_reduce(low, dist.ReduceOp.MIN)
dist.all_reduce(high, dist.ReduceOp.MAX)
if world.rank == 0:
    print(f"largest difference {float((high - low).max())}")
    print(f"reductions a bucket in 2 updates: {max(calls.values())}")
dist.destroy_process_group()
