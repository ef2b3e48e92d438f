"""What does one rank hold? An engine's flags in; bytes of parameters, gradients and optimizer state out, measured.

torchrun --nproc_per_node 2 scripts/memory.py --dim 768 --n_layers 16 --engine fsdp
deepspeed --num_gpus 2 scripts/memory.py --dim 768 --n_layers 16 --zero_stage 2
python scripts/memory.py --adapter lora
python scripts/memory.py --plan --params 7e9 --gpus 64 --memory 80     on paper: see scripts/split_plan.py

One update on one short row, random weights, nothing saved. The bytes are those of the live tensors of rank 0, each
storage counted once: what the parameters stand on, what the optimizer keeps, and what is there before the update and
gone after it (gradients). Beside them the formula of the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054,
section 3) for this engine's number of copies.

The flags are those of pretraining. Shape, engine, precision, offload and the adapter count; data, batches and reporting
do not.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__" and "--plan" in sys.argv:  # on paper, before torch is imported
    from scripts.split_plan import main as on_paper

    sys.exit(on_paper())

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dataset.batch import Batch
from model import GPT
from model.adapters import begun
from training import NextToken, PretrainConfig, build_engine
from training.adapting import new_adapter
from training.engines import Engine
from training.metrics import peak_memory_mb
from training.setup import Start, run_stage, start_machine, starting_model

if TYPE_CHECKING:  # DeepSpeed is an extra
    from training.engines.deepspeed import ZeroEngine

Storages = dict[int, int]  # address -> bytes


def storages(tensors: Iterable[object]) -> Storages:
    """The storages of the dense tensors among these, of a DTensor its local part; anything else is passed over."""
    found: Storages = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a compiler's stand-in for a tensor has no storage
                found[storage.data_ptr()] = storage.nbytes()
    return found


def live(engine: Engine) -> Storages:
    """Every tensor Python can reach; gradients live in C++ until they are asked for."""
    kept = [parameter.grad for parameter in engine.model.parameters()]
    gc.collect()
    return storages([*kept, *(thing for thing in gc.get_objects() if isinstance(thing, Tensor))])


def parameters_of(engine: Engine) -> Storages:
    parts = [getattr(parameter, "ds_tensor", None) for parameter in engine.model.parameters()]  # ZeRO-3's own part
    return storages([*engine.model.parameters(), *parts])


def optimizer_of(engine: Engine) -> Storages:
    """Moments, and master copies where the optimizer works on other tensors than the model's."""
    tensors: list[object] = [shard for shard, _ in engine.shards()] if partitioned(engine) else []
    for optimizer in engine.optimizers:
        tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return storages(tensors)


def gradients_of(engine: Engine) -> Storages:
    """Those on the parameters, and ZeRO-3's buffer, which stays between updates."""
    buffer = getattr(engine.network.optimizer, "grad_partitions_flat_buffer", None) if partitioned(engine) else None
    return storages([buffer, *(parameter.grad for parameter in engine.model.parameters())])


def partitioned(engine: Engine) -> "TypeGuard[ZeroEngine]":
    """Whether its optimizer works on flat shards of the parameters."""
    return engine.name == "deepspeed" and stage_of(engine) > 0


def stage_of(engine: Engine) -> int:
    """The ZeRO stage an engine amounts to."""
    return {"single": 0, "ddp": 0, "fsdp": 3}.get(engine.name, getattr(engine, "stage", 0))


def measure(engine: Engine) -> dict[str, int]:
    ids = torch.arange(16).expand(1, 16)
    batch = Batch.of(ids, ids + 1, torch.arange(16)[None], row_ids=[0], real_tokens=16)
    for _ in range(2):  # the first update makes the optimizer's state
        engine.forward_backward([batch], NextToken())
        held = gradients_of(engine)
        before_step = live(engine)
        engine.step(1e-4)
    after_step = live(engine)
    parameters = parameters_of(engine)
    optimizer = {key: size for key, size in optimizer_of(engine).items() if key not in parameters}
    known = parameters.keys() | optimizer.keys()
    gradients = {k: v for k, v in before_step.items() if k not in known and (k in held or k not in after_step)}
    buffers = {k: v for k, v in after_step.items() if k not in known and k not in gradients}
    named = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, "buffers": buffers}
    return {name: sum(part.values()) for name, part in named.items()}


def formula(engine: Engine, shards: int, stage: int, n: int, learnt: int | None = None) -> dict[str, float]:
    """Bytes a rank by the paper: parameters, gradients and optimizer state, each divided by the ranks that share it.

    n: parameters; learnt: those of them that are, which alone have gradients and optimizer state (None: all).
    """
    learnt = n if learnt is None else learnt
    deepspeed = engine.name == "deepspeed"
    mixed = deepspeed and engine.dtype != torch.float32  # 16-bit parameters and gradients beside masters
    size = 2 if mixed else 4
    # Adam's two moments; DeepSpeed keeps a float32 master copy as well, in float32 too once it partitions
    optimizer = 8 + (4 if mixed or (deepspeed and stage) else 0)
    return {
        "parameters": size * n / (shards if stage >= 3 else 1),
        "gradients": size * learnt / (shards if stage >= 2 else 1),
        "optimizer": optimizer * learnt / (shards if stage >= 1 else 1),
    }


def adapted(start: Start[PretrainConfig], config: PretrainConfig) -> Start[PretrainConfig]:
    """With the adapter that flags ask for, on random weights, which training would refuse."""
    if config.adapter is None:
        return start
    adapter, plain = new_adapter(config, "none", start.tokenizer), start.weights
    with torch.device("meta"):
        model = GPT(start.model.config, adapter)
    return replace(start, model=model, weights=lambda: begun(plain(), adapter, config.seed))


def main(config: PretrainConfig) -> None:
    machine = start_machine(config)
    start = adapted(starting_model(replace(config, init_from="none", adapter=None)), config)
    n, learnt = start.model.num_parameters(), start.model.num_parameters(learnt=True)
    engine = build_engine(start.model, start.config, machine, start.weights)
    measured = measure(engine)
    shards = machine.world.local_size if config.hsdp else machine.world.size
    expected = formula(engine, shards, stage_of(engine), n, learnt)
    if machine.world.rank == 0:
        name = engine.name if engine.name != "deepspeed" else f"deepspeed ZeRO-{stage_of(engine)}"
        dtype = str(machine.dtype).split(".")[1]
        print(f"{name}, {machine.world.size} ranks, {n:,} parameters, {learnt:,} learnt, {dtype}, bytes on rank 0:")
        for part, size in measured.items():
            beside = f"  formula {expected[part]:>15,.0f}" if part in expected else ""
            print(f"  {part:<11} {size:>15,}{beside}")
        state = sum(measured[part] for part in expected)
        print(f"  {'state':<11} {state:>15,}  formula {sum(expected.values()):>15,.0f}")
        print(json.dumps({"engine": name, "ranks": machine.world.size, "measured": measured, "formula": expected}))
        print(f"  peak memory of the process {peak_memory_mb(engine.device):,.0f} MB")


if __name__ == "__main__":
    run_stage(main, PretrainConfig, __doc__)
