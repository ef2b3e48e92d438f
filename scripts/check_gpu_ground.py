"""What the checks of check_gpu.py stand on: a device and a stage's flags in; rows, models and engines out.

ground = Ground(torch.device("cuda", 0), ["--dim", "512"])
ground.batches("dpo", 2)                          micro-batches of update 2, packed from the sample data
ground.engine("dpo", torch.bfloat16)              one process's engine, its weights the same at every call
judged(error < 1e-2, "off by 0.004", "what it means where it is more, and what to do")
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset.batch import Batch
from model import GPT
from scripts.benchmark import load
from training import STAGES, distributed, load_config
from training.config import Config
from training.distributed import World
from training.engines import Machine, SingleEngine, Weights
from training.objectives import Objective
from training.setup import Data, Start
from training.transfer import Transfer

OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"
# where the flags given do not say otherwise: few layers, since all share one graph, and two micro-batches an update
DEFAULTS = ["--n_layers", "4", "--batch_size", "2", "--accumulation_steps", "2", "--optimizer", "adamw"]
TRIES = 24  # updates within which a loss scaler finds its scale; each that is not finite halves it

Watching = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass
class Result:
    status: str  # OK, FAILED or LEFT_OUT
    found: str  # the figure; or why it was left out
    advice: str = ""  # of what failed: what it means, what to do
    paste: str = ""  # more lines, for docs/benchmarks.md


Check = Callable[["Ground"], Result]


def judged(good: bool, found: str, advice: str) -> Result:
    return Result(OK, found) if good else Result(FAILED, found, advice)


def left_out(why: str) -> Result:
    return Result(LEFT_OUT, why)


class Precision(NamedTuple):
    dtype: torch.dtype
    matmul: str  # torch.set_float32_matmul_precision
    loss: float  # most it may differ from a CPU's in float32, as a share
    gradient: float  # likewise, of every parameter's: the norm of the difference by the norm


# 16 bits round each number by 2^-9 (bfloat16) or 2^-12 (float16) of it, TF32 what is multiplied by 2^-12; what becomes
# of that in a gradient was measured on a CPU (0.029 and 0.0035 at most, at dim 512), and more is allowed
PRECISIONS = {
    "float32": Precision(torch.float32, "highest", 1e-5, 1e-3),
    "tf32": Precision(torch.float32, "high", 5e-3, 1.5e-2),
    "bfloat16": Precision(torch.bfloat16, "highest", 2e-2, 6e-2),
    "float16": Precision(torch.float16, "highest", 5e-3, 1.5e-2),
}


class Learnt(NamedTuple):
    """Of an update."""

    loss: float  # mean
    gradients: dict[str, Tensor]  # float32, on the CPU


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Ground:
    """flags: the stages' (docs/flags.md), as words.

    compiles: whether blocks are compiled here unasked. watching: what raises RuntimeError where its block waits for
    the device; None where nothing can tell.
    """

    device: torch.device
    flags: list[str]
    world: World = field(default_factory=World)
    compiles: bool = False
    watching: Watching | None = None
    expected: dict[str, Learnt] = field(default_factory=dict)  # by stage, of a CPU

    def __post_init__(self) -> None:
        self.loaded = cache(self.load)
        self.dtype = distributed.pick_dtype("auto", self.device)  # 16 bits on every card
        self.machine = Machine(self.world, self.device, self.dtype)

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"

    def lacks(self, dtype: torch.dtype) -> str:
        """Why nothing is to be said of a type here; "" where it is one of the device's own."""
        if dtype == torch.bfloat16 and self.on_card and torch.cuda.get_device_capability(self.device) < (8, 0):
            return "cards before compute capability 8.0 do not have bfloat16; float16 is theirs"
        return ""

    def load(self, stage: str) -> tuple[Start[Any], Data]:
        """Random weights, and the rows that are learnt from. Ranks divide what one process has in an update."""
        config = load_config(STAGES[stage].config, [*DEFAULTS, *self.flags])
        config = replace(config, batch_size=max(1, config.batch_size // self.world.data_size))
        config = replace(config, init_from="none", val_fraction=0.0, max_steps=1, device=str(self.device))
        with contextlib.redirect_stderr(io.StringIO()):  # what is said of the rows
            return load(config, self.machine)

    def batches(self, stage: str, update: int) -> list[Batch]:
        loader = self.loaded(stage)[1].train
        return loader.update(update * loader.rows_per_update)

    def sent(self, stage: str, update: int) -> list[Batch]:
        """The same, on the device, as training sends them."""
        return Transfer(self.device).send(self.batches(stage, update)).arrived()

    def objective(self, stage: str) -> Objective[Any]:
        return STAGES[stage].objective(self.loaded(stage)[0].config)

    def start(self, stage: str, **changes: object) -> tuple[GPT, Config, Weights]:
        """A model without memory, its config, and its weights."""
        start = self.loaded(stage)[0]
        return copy.deepcopy(start.model), replace(start.config, **changes), spread(start.weights)  # type: ignore[arg-type]

    def engine(self, stage: str, dtype: torch.dtype, compiled: bool = False, matmul: str = "highest") -> SingleEngine:
        if compiled:
            torch.compiler.reset()  # of too many graphs of one function torch would make no more
        model, config, weights = self.start(stage, compile=compiled)
        engine = SingleEngine(model, config, Machine(World(), self.device, dtype), weights)
        torch.set_float32_matmul_precision(matmul)  # the engine asks for TF32
        return engine

    def network(self, dtype: torch.dtype) -> GPT:
        """To generate with."""
        return self.engine("pretrain", torch.float32).model.to(dtype).eval()


def spread(weights: Weights) -> Weights:
    """Weights of the same shapes, far from small first ones, norms too, so that a wrong use of any of them shows:
    attention of first weights looks everywhere alike, and hides what it should not see."""

    def made() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in weights():
            noise = torch.randn(tensor.shape, generator=generator)
            yield name, 1 + 0.2 * noise if noise.ndim == 1 else noise * noise.shape[1] ** -0.5

    return made
