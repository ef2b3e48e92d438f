"""Every engine learns the same: flags in; losses of a few updates by engine and precision, or why there are none.

torchrun --standalone --nproc_per_node 2 scripts/check_gpu_engines.py --json losses.json --device cuda --dim 512
torchrun --standalone --nproc_per_node 4 scripts/check_gpu_engines.py --json losses.json --engines "pp2 tp2"

The updates are of the same rows, however many processes divide rows or model. One of a learning rate of 0 comes before
them, in which float16's loss scaler finds its scale, so that no engine skips more of them than another.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dataset.records import one_line
from scripts.check_gpu_ground import TRIES, Ground, Result, judged, left_out, name_of
from training import build_engine, distributed
from training.distributed import World
from training.engines import Machine
from training.split import check_micro_batches, check_shape

Flags = dict[str, Any]
SPREAD: dict[str, Flags] = {name: {"engine": name} for name in ("ddp", "fsdp")}
SPREAD |= {f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}
# by processes, and name; a number in a name is of ranks that share the matrices (tp), blocks (pp) or rows (the others)
ENGINES: dict[int, dict[str, Flags]] = {
    1: {"single": {"engine": "single"}, **SPREAD},
    2: {
        **SPREAD,
        "tp2": {"engine": "fsdp", "tp": 2},
        "pp2 1f1b": {"engine": "ddp", "pp": 2},
        "pp2 zb": {"engine": "ddp", "pp": 2, "pp_schedule": "zb"},
        "pp2 zbv": {"engine": "ddp", "pp": 2, "pp_schedule": "zbv"},
        "pp2 fsdp": {"engine": "fsdp", "pp": 2},
    },
    4: {
        "tp2 fsdp2": {"engine": "fsdp", "tp": 2},
        "pp2 ddp2": {"engine": "ddp", "pp": 2},
        "pp2 tp2": {"engine": "fsdp", "pp": 2, "tp": 2},
    },
}
DTYPES = {torch.bfloat16: 5e-3, torch.float16: 2e-3}  # how far losses may be from one process's, as a share
UPDATES, LEARNING_RATE = 4, 1e-3
SECONDS = 360  # for all engines of a size
SILENT = timedelta(seconds=60)  # that a rank waits for another: one that fails alone must not keep all of them
Losses = dict[str, dict[str, list[float] | str]]  # by engine and precision; a text says why there are none


# Under the launcher ----------------------------------------------------------------------------------------------


def learn(ground: Ground, engine_flags: Flags, dtype: torch.dtype) -> list[float]:
    """Mean losses of some updates of pretraining. Raises ArithmeticError where no scale of the loss is found."""
    model, config, weights = ground.start("pretrain", compile=False, **engine_flags)
    engine = build_engine(model, config, Machine(ground.world, ground.device, dtype), weights)
    distributed.set_timeout(SILENT)
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


def learn_as(engine_flags: Flags, dtype: torch.dtype, ground: Ground) -> list[float] | str:
    """Losses, or why there are none."""
    try:
        return not_here(dtype, ground) or learn(ground, engine_flags, dtype)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def main(argv: list[str]) -> None:
    names = [name for each in ENGINES.values() for name in each]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where losses are written")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--engines", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(dict.fromkeys(names))} [all of so many processes]")  # fmt: skip
    own, flags = parser.parse_known_args(argv)
    world = World.from_environment()
    device = distributed.pick_device(own.device, world)
    distributed.start(world, device)
    ground_of = cache(lambda tp, pp: Ground(device, flags, World.from_environment(tp, pp)))
    found: Losses = {}
    try:
        for name, engine_flags in ENGINES[world.size].items():
            if name in own.engines:
                ground = ground_of(engine_flags.get("tp", 1), engine_flags.get("pp", 1))
                found[name] = {name_of(dtype): learn_as(engine_flags, dtype, ground) for dtype in DTYPES}
                if world.rank == 0:  # whatever becomes of the next
                    own.json.write_text(json.dumps(found))
    finally:
        distributed.stop()


# The check -------------------------------------------------------------------------------------------------------


@cache
def spread_over(processes: int, device: str, flags: tuple[str, ...]) -> Losses:
    """What `main` finds under torchrun; where it ended before an engine's turn, what it said last."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        ended = launch([*launcher, str(Path(__file__).resolve()), "--json", str(file), "--device", device, *flags])
        found = json.loads(file.read_text()) if file.is_file() else {}
    return {name: found.get(name, dict.fromkeys(map(name_of, DTYPES), ended)) for name in ENGINES[processes]}


def launch(command: list[str]) -> str:
    """How torchrun ended; "" where well."""
    torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = torchrun.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # which ends its processes; killed, it would leave them on the cards
        torchrun.communicate()
        return f"torchrun was not done after {SECONDS} s"
    return f"torchrun ended with {torchrun.returncode}: {said[-1500:]}" if torchrun.returncode else ""


def same_losses(name: str, processes: int, ground: Ground) -> Result:
    """An engine's losses beside those of one process without any spreading."""
    cards = torch.cuda.device_count() if ground.on_card else 1
    if processes > cards:
        there = f"{cards} card{'s' * (cards > 1)}; it takes {processes}"
        return left_out(there if ground.on_card else "a CPU's are met by the tests")
    engine_flags = ENGINES[processes][name]
    if engine_flags["engine"] == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return left_out("deepspeed is not installed: pip install -e '.[deepspeed]'")
    if cannot := refusal(engine_flags, ground):
        return left_out(cannot)
    flags = tuple(ground.flags)
    alone = spread_over(1, ground.device.type, flags)["single"]
    found = spread_over(processes, ground.device.type, flags)[name]
    return compared(found, alone, ground)


def refusal(engine_flags: Flags, ground: Ground) -> str:
    """Why this model, or its updates, cannot be split so; "" where they can."""
    start = ground.loaded("pretrain")[0]
    config = replace(start.config, **engine_flags)
    try:
        check_shape(config, start.model.config)
        check_micro_batches(config, config.accumulation_steps)
    except ValueError as error:
        return one_line(error)
    return ""


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
