"""Is Seedling right and fast on this card? The first thing to run on one: a line a check, and exit status 0 or 1.

    python scripts/check_gpu.py                                   all of it, on the sample data, in a few minutes
    python scripts/check_gpu.py --no_benchmark --json card.json   without the table of speeds; results in a file
    python scripts/check_gpu.py --only parity graphs              some groups of checks
    python scripts/check_gpu.py --device cpu --dim 64             what can be said without a card

Every line is `ok`, `FAILED` (then the next says what it means and what to do) or `left out` (and why), with what was
found and the seconds it took. docs/benchmarks.md says what each group asks.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dataset.records import one_line
from scripts.check_gpu_ground import FAILED, LEFT_OUT, OK, Check, Ground, Result
from scripts.check_gpu_parts import checks
from scripts.check_gpu_promises import sync_errors
from training import distributed
from training.distributed import World

CRASHED = "it was to give a figure and ended with an error, whose traceback stands above: what it asks was not answered"
Results = dict[str, tuple[Result, float]]  # by name, with the seconds it took


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Its own flags, and those left over, which are the stages'."""
    groups = list(dict.fromkeys(map(group_of, checks())))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="All other flags are the stages' (docs/flags.md): shape, batch, --cache_dir ...",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu [cuda]")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP",
                        help=f"of {', '.join(groups)} [all]")  # fmt: skip
    parser.add_argument("--no_benchmark", "--no-benchmark", action="store_true", help="leave the table of speeds out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    return parser.parse_known_args(argv)


def group_of(name: str) -> str:
    return name.split(":")[0]


def ground_of(device: torch.device, flags: list[str]) -> Ground:
    on_card = device.type == "cuda"
    return Ground(
        device, flags, compiles=distributed.pick_compile(None, device), watching=sync_errors if on_card else None
    )


def ask(check: Check, ground: Ground) -> Result:
    """What a check finds; an error of any kind is a failure, and those after it are asked all the same."""
    try:
        return check(ground)
    except Exception as error:
        traceback.print_exc()
        return Result(FAILED, f"{type(error).__name__}: {one_line(error)}", CRASHED)
    finally:
        if ground.on_card:  # what is left of one must not stand in the way of the next
            gc.collect()
            torch.cuda.empty_cache()


def run(selected: dict[str, Check], ground: Ground) -> Results:
    """Ask one after another, and print a line each."""
    found: Results = {}
    wide = max(map(len, selected), default=0)
    for name, check in selected.items():
        began = time.perf_counter()
        result = ask(check, ground)
        found[name] = result, time.perf_counter() - began
        print(f"{result.status:<8}  {name:<{wide}}  {result.found}  [{found[name][1]:.1f} s]", flush=True)
        if result.advice and result.status == FAILED:
            print(f"{'':<8}  {'':<{wide}}  {result.advice}", flush=True)
    return found


def main(argv: list[str]) -> int:
    """The exit status: 0 where nothing failed, 1 where something did, 2 for a device or flag that is not there."""
    own, flags = parse(argv)
    try:
        ground = ground_of(distributed.pick_device(own.device, World()), flags)
        ground.loaded("pretrain")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    selected = {name: check for name, check in checks().items() if group_of(name) in own.only}
    if own.no_benchmark:
        selected = {name: check for name, check in selected.items() if group_of(name) != "benchmark"}
    found = run(selected, ground)
    for result, _ in found.values():
        if result.paste:
            print(f"\n{result.paste}\n")
    statuses = [result.status for result, _ in found.values()]
    failed = [name for name, (result, _) in found.items() if result.status == FAILED]
    seconds = sum(spent for _, spent in found.values())
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in (OK, FAILED, LEFT_OUT))
    print(f"{counts} in {seconds:.0f} s" + "".join(f"\n  FAILED  {name}" for name in failed))
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"name": name, **asdict(result), "seconds": spent} for name, (result, spent) in found.items()]
        own.json.write_text(json.dumps({"failed": failed, "checks": lines}, indent=1), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
