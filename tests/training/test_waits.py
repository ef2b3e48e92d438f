"""Nothing within an update waits for the device: real runs of the real loop, watched for what would.

On a CPU nothing waits, but what would wait on a GPU is known by name: a tensor that becomes a Python number or a truth
value, an operator whose result's size depends on data, a copy to the host. Two modes of torch see all of them, those
that Python asks for and those that operators and optimizers ask for inside.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.batch import Batch
from model import GPT, GPTConfig
from model.adapters import LoRA
from tests.helpers import PLAIN, ROOT, TINY, launched, make_data, make_teacher, train_here
from training import NextToken, PretrainConfig, build_engine, distributed
from training.distributed import World
from training.engines import Machine
from training.engines.pytorch import PyTorchEngine
from training.transfer import Deferred

ASKED = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}  # of a tensor
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
# what is done beside updates, when it is due, or in a thread, and what only a CPU does; it waits, and may
BESIDE = {
    "plan_blocks",
    "Run.begin",
    "Run.report",
    "Run.settle",
    "Saver.save",
    "Saver.advance",
    "Run.end",
    "Teacher.load",
    "Upcoming.make",
}

ASKED_BY = {"Stage.forward", "Pipelined.loss"}  # a pipeline's stages, for the number of a micro-batch


def our_functions() -> list[str]:
    """Names of our functions that run, the innermost first."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if ours(frame):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]
    return names


def ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    installed = "/site-packages/" in file  # in an environment that stands in the same folder
    return file.startswith(str(ROOT)) and "/tests/" not in file and not installed


class Watch:
    """Notes what would wait within one of some functions of ours, and outside BESIDE."""

    def __init__(self, *inside: str) -> None:
        self.inside = set(inside)
        self.waits: list[tuple[str, str]] = []  # what would wait, our innermost function that asked for it
        self.queued = 0  # updates
        self.reads: list[int] = []  # how many were queued whenever a deferred number was read

    def note(self, what: str) -> None:
        functions = our_functions()
        if not self.inside & set(functions) or BESIDE & set(functions):
            return
        if functions[0] == "Deferred.read":
            self.reads.append(self.queued)
        else:
            self.waits.append((what, functions[0]))


class Python(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ASKED or (name == "to" and "cpu" in [arg for arg in args[1:] if isinstance(arg, str)]):
            self.note(name)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in INDEXING else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in OPERATORS or by_mask:
            self.note(f"aten.{name}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    make_data(folder, rows=24)
    make_teacher(folder / "teacher")
    return folder


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Of the run within the test; it counts the updates that engines queue."""
    watch, step = Watch("Run.loop"), PyTorchEngine.step

    def counted(engine: PyTorchEngine, learning_rate: float) -> Deferred[float]:
        norm = step(engine, learning_rate)
        watch.queued += 1
        return norm

    monkeypatch.setattr(PyTorchEngine, "step", counted)
    yield watch
    distributed.stop()  # engines of several ranks meet alone, too


RUNS = {
    "pretrain, bfloat16, checkpointed": ["--dtype", "bfloat16", "--grad_checkpointing"],
    "full_sft, ddp, float16": ["--dtype", "float16", "--engine", "ddp"],
    "dpo, muon": ["--optimizer", "muon", "--grad_clip", 0],
    "pretrain, fsdp, muon": ["--engine", "fsdp", "--optimizer", "muon"],
    "distill, bfloat16": ["--dtype", "bfloat16", "--distill_loss", "jsd", "--ce_weight", 0.5],
}
DATA = {"pretrain": "pretrain.jsonl", "full_sft": "sft.jsonl", "dpo": "dpo.jsonl", "distill": "sft.jsonl"}


@pytest.mark.parametrize("name", RUNS)
def test_an_update_waits_for_nothing_and_its_numbers_are_read_once_the_next_is_queued(
    base: Path, tmp_path: Path, watch: Watch, name: str
) -> None:
    stage = name.split(",")[0]
    files = ["--data_path", base / DATA[stage], "--cache_dir", base / "cache", "--out_dir", tmp_path]
    model = ["--init_from", "none", "--dim", 32, *TINY, *PLAIN]
    steps = ["--batch_size", 1, "--accumulation_steps", 2, "--max_steps", 4, "--val_fraction", 0, "--log_interval", 9]
    asked = ["--teacher", base / "teacher"] if stage == "distill" else []
    with Python(watch.note), Operators(watch.note):
        train_here(stage, *files, *model, *steps, "--eval_answers", 0, *asked, *RUNS[name])
    assert set(watch.waits) == set()
    # the norm and the sums of each update; those of the last are waited for, since a line is due
    assert watch.queued == 4 and watch.reads == [2, 2, 3, 3, 4, 4]


def waits_of(engine: Any, updates: int = 2) -> set[tuple[str, str]]:
    """What would wait in some updates behind a first one, in which stages tell each other what will come."""
    watch = Watch("Accumulating.forward_backward", "Pipelined.forward_backward", "PyTorchEngine.step")
    ids = torch.arange(16).expand(2, 16)
    for update in range(1 + updates):
        with ExitStack() as stack:
            if update:
                stack.enter_context(Python(watch.note))
                stack.enter_context(Operators(watch.note))
            engine.forward_backward([Batch.of(ids, ids + 1, ids, [0, 1], 32)] * 2, NextToken(), weight=64.0)
            engine.step(1e-3)
    return set(watch.waits)


SPREAD: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fsdp, muon": (torch.bfloat16, {"engine": "fsdp", "optimizer": "muon"}),
    "tp": (torch.bfloat16, {"engine": "fsdp", "tp": 2}),
    "tp, float16": (torch.float16, {"engine": "fsdp", "tp": 2}),
    "tp, learnt rows": (torch.bfloat16, {"engine": "fsdp", "tp": 2, "adapter": "lora"}),
}


@pytest.mark.parametrize("name", SPREAD)
def test_ranks_that_send_each_other_parts_wait_for_nothing_either(name: str) -> None:
    """Here is the first of two, and what it would send goes nowhere. Of DDP's sending Python sees nothing."""
    dtype, flags = SPREAD[name]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        world = World(0, 2, 0, 2, tp=flags.get("tp", 1))
        shape = GPTConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=16)
        with torch.device("meta"):
            model = GPT(shape, LoRA(rank=2, tokens=(3, 40)) if "adapter" in flags else None)
        weights = {name: torch.randn(p.shape) * 0.1 for name, p in model.named_parameters()}
        machine = Machine(world, torch.device("cpu"), dtype)
        assert waits_of(build_engine(model, PretrainConfig(**flags), machine, weights.items)) == set()
    finally:
        distributed.stop()


def test_stages_wait_for_nothing_either() -> None:
    """In real processes: what one is sent has to be something. A micro-batch's number never leaves the host."""
    numbers = {(what, where) for what in ("__int__", "aten._local_scalar_dense") for where in ASKED_BY}
    lines = [line for line in launched(ROOT / "tests/training/stages.py").stdout.splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    assert len(found) == 2 * 5  # both ranks, every way
    for each in found:
        waits = {(what, where) for what, where in each["waits"]}
        assert waits and waits <= numbers, each


WAITING: dict[str, Callable[[Tensor], object]] = {
    "__bool__": lambda values: bool(values[0] > 0),
    "__float__": lambda values: float(values[0]),
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "to": lambda values: values.to("cpu", non_blocking=True),
    "aten.nonzero": lambda values: (values > 1).nonzero(),
    "aten.index": lambda values: values[values > 1],
    "aten.index_put_": lambda values: values.index_put_((values > 1,), torch.tensor(0.0)),
    "aten._local_scalar_dense": lambda values: torch.add(values, values, alpha=values[0]),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_watch_sees_what_would_wait(name: str) -> None:
    seen: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(Python(seen.append))
        stack.enter_context(Operators(seen.append))
        WAITING[name](torch.arange(3.0))
    assert name in seen
