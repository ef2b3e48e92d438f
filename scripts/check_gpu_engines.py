"""Every engine learns the same: flags in; losses of a few updates by engine and precision, or why there are none.

torchrun --standalone --nproc_per_node 2 scripts/check_gpu_engines.py --json losses.json --device cuda --dim 512

The updates are of the same rows, however many processes divide them. One of a learning rate of 0 comes before them,
in which float16's loss scaler finds its scale, so that no engine skips more of them than another.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dataset.records import one_line
from scripts.check_gpu_ground import TRIES, Ground, Result, judged, left_out, name_of
from training import build_engine, distributed
from training.distributed import World
from training.engines import Machine

ENGINES: dict[str, dict[str, object]] = {name: {"engine": name} for name in ("single", "ddp", "fsdp")}
ENGINES |= {f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}
DTYPES = {torch.bfloat16: 5e-3, torch.float16: 2e-3}  # how far losses may be from one process's, as a share
UPDATES, LEARNING_RATE = 4, 1e-3
SECONDS = 240  # for all engines of a size
Losses = dict[str, dict[str, list[float] | str]]  # by engine and precision; a text says why there are none


# Under the launcher ----------------------------------------------------------------------------------------------


def learn(ground: Ground, engine_flags: dict[str, object], dtype: torch.dtype) -> list[float]:
    """Mean losses of some updates of pretraining. Raises ArithmeticError where no scale of the loss is found."""
    model, config, weights = ground.start("pretrain", compile=False, **engine_flags)
    engine = build_engine(model, config, Machine(ground.world, ground.device, dtype), weights)
    objective = ground.objective("pretrain")

    def update(number: int, learning_rate: float) -> tuple[float, float]:
        totals = engine.forward_backward(ground.sent("pretrain", number), objective)
        norm, read = engine.step(learning_rate).read(), totals.read()
        return read.sums["loss"] / read.weight, norm

    for _ in range(TRIES):
        if math.isfinite(update(0, 0.0)[1]):
            return [update(number, LEARNING_RATE)[0] for number in range(UPDATES)]
    raise ArithmeticError(f"no gradient of {TRIES} updates is finite")


def not_here(dtype: torch.dtype, ground: Ground) -> str:
    """Why a precision is left out; "" where it is not."""
    emulated = dtype == torch.float16 and not ground.on_card
    return "left out, a CPU emulates it and DeepSpeed refuses" if emulated else ground.lacks(dtype)


def learn_all(ground: Ground) -> Losses:
    found: Losses = {}
    for name, engine_flags in ENGINES.items():
        if name == "single" and ground.world.size > 1:
            continue
        found[name] = {}
        for dtype in DTYPES:
            try:
                found[name][name_of(dtype)] = not_here(dtype, ground) or learn(ground, engine_flags, dtype)
            except Exception as error:
                found[name][name_of(dtype)] = f"{type(error).__name__}: {one_line(error)}"
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where losses are written")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    own, flags = parser.parse_known_args(argv)
    world = World.from_environment()
    device = distributed.pick_device(own.device, world)
    distributed.start(world, device)
    try:
        found = learn_all(Ground(device, flags, world))
        if world.rank == 0:
            own.json.write_text(json.dumps(found))
    finally:
        distributed.stop()


# The check -------------------------------------------------------------------------------------------------------


@cache
def spread_over(processes: int, device: str, flags: tuple[str, ...]) -> Losses:
    """What `learn_all` finds under torchrun. Raises RuntimeError with the last of what it said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, str(Path(__file__).resolve()), "--json", str(file), "--device", device, *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{processes} processes were not done after {SECONDS} s") from None
        if done.returncode or not file.is_file():
            raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-1500:]}")
        return json.loads(file.read_text())


def same_losses(name: str, processes: int, ground: Ground) -> Result:
    """An engine's losses beside those of one process without any spreading."""
    cards = torch.cuda.device_count() if ground.on_card else 1
    if processes > cards:
        return left_out(f"{cards} card; it takes {processes}" if ground.on_card else "a CPU's are met by the tests")
    if ENGINES[name]["engine"] == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return left_out("deepspeed is not installed: pip install -e '.[deepspeed]'")
    flags = tuple(ground.flags)
    alone = spread_over(1, ground.device.type, flags)["single"]
    found = spread_over(processes, ground.device.type, flags)[name]
    return compared(found, alone, ground)


def compared(found: dict[str, list[float] | str], alone: dict[str, list[float] | str], ground: Ground) -> Result:
    good, said = True, []
    for dtype, allowed in DTYPES.items():
        losses, expected = found[name_of(dtype)], alone[name_of(dtype)]
        if isinstance(losses, str) or isinstance(expected, str):
            good = good and bool(not_here(dtype, ground))
            said.append(f"{name_of(dtype)}: {losses if isinstance(losses, str) else expected}")
            continue
        finite = all(math.isfinite(loss) for loss in losses)
        off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)) if finite else math.inf
        moved = len(set(losses)) > 1
        good = good and off <= allowed and moved
        said.append(f"{name_of(dtype)}: {losses[0]:.4f}..{losses[-1]:.4f}, off by {off:.1e} (at most {allowed:g})")
    return judged(
        good,
        "; ".join(said),
        "it does not learn what one process does: train with --engine single, or another engine, until "
        "`pytest tests/invariant` and this agree",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
