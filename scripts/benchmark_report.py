"""What the benchmark says: timed updates in; a table, Markdown, one JSON, and ratios to an earlier JSON out.

{"machine": {"cpu": "AMD EPYC", "gpu": null, "threads": 2, "dtype": "float32", ...},
 "lines": [{"name": "pretrain", "unit": "real tokens", "ours": {"per_second": 812.4, ...}, "theirs": {...}, ...}]}
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from dataset.cores import usable_cores
from model import GPTConfig
from scripts.benchmark_clock import Rates, Timed
from training.engines import Machine

ROOT = Path(__file__).parent.parent
Fact = str | int | float | bool | None
WHERE = ("cpu", "gpu", "ranks", "threads", "dtype", "torch")  # what a ratio to an earlier run presupposes


@dataclass
class Measured:
    """One side of a line. A speed is the median over its updates."""

    per_second: float
    low: float
    high: float
    weight_per_second: float  # in the objective's unit
    seconds: list[float]  # of every update that counts
    tokens: list[float]
    weights: list[float]
    peak_mb: float | None = None  # MiB, without what the other side keeps
    first_seconds: float | None = None  # until it is built and its first update made
    own_share: float | None = None  # 6 N operations a token, of the rate of the model's own products
    square_share: float | None = None  # of the rate of a 2048^3 product
    mfu: float | None = None  # as training reports it, of the data sheet's peak; attention counted


@dataclass
class Line:
    """A line of the table: the same work by ours and theirs."""

    name: str
    unit: str  # what is counted a second
    shape: dict[str, Fact]
    ours: Measured
    theirs: Measured | None = None
    weighed: str = ""  # the objective's unit, where that is not tokens
    ratio: tuple[float, float, float] | None = None  # ours / theirs: median, least, most over rounds
    own_rate: float | None = None  # FLOP/s, median over rounds
    square_rate: float | None = None


def measured(timed: Timed, model: bool) -> Measured:
    tokens, weights = [work.tokens for work in timed.work], [work.weight for work in timed.work]
    by_tokens = per_second(tokens, timed.seconds)
    by_weight = statistics.median(per_second(weights, timed.seconds))
    return Measured(
        statistics.median(by_tokens), min(by_tokens), max(by_tokens), by_weight, timed.seconds,
        tokens, weights, *((timed.peak_mb, timed.first_seconds) if model else ()),
    )  # fmt: skip


def per_second(done: list[float], seconds: list[float]) -> list[float]:
    """Of each update."""
    return [each / spent for each, spent in zip(done, seconds, strict=True)]


def line(
    name: str, unit: str, shape: dict[str, Fact], timed: dict[str, Timed], weighed: str = "", model: bool = True
) -> Line:
    """Ours beside theirs, where theirs was measured. model: whether there is one, whose memory and start count."""
    sides = {side: measured(each, model) for side, each in timed.items()}
    found = Line(name, unit, shape, sides["ours"], sides.get("theirs"), weighed)
    if found.theirs is not None:
        pairs = zip(speeds(found.ours, bool(weighed)), speeds(found.theirs, bool(weighed)), strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        found.ratio = statistics.median(ratios), min(ratios), max(ratios)
    return found


def speeds(side: Measured, weighed: bool = False) -> list[float]:
    """By tokens or by weight: a pair's tokens are fewer where its prompt is there once."""
    return per_second(side.weights if weighed else side.tokens, side.seconds)


def add_ceiling(found: Line, rates: Rates, ranks: int, shape: GPTConfig, row: int, peak: float | None) -> None:
    """Shares of what as many ranks would do, were all their time that of matrix products.

    row: tokens, for attention's part in MFU. peak: FLOP/s of one device by its data sheet, where that is known.
    """
    own, square = ([ranks * rate for rate in each] for each in (rates.own, rates.square))
    found.own_rate, found.square_rate = statistics.median(own), statistics.median(square)
    product_flops = shape.flops_per_token(0)  # 6 N: without tokens to look back at there is no attention
    for side in (found.ours, found.theirs):
        if side is not None:
            each = [speed * product_flops for speed in speeds(side)]
            side.own_share = statistics.median(flops / rate for flops, rate in zip(each, own, strict=True))
            side.square_share = statistics.median(flops / rate for flops, rate in zip(each, square, strict=True))
            side.mfu = side.per_second * shape.flops_per_token(row) / (ranks * peak) if peak else None


# The machine ---------------------------------------------------------------------------------------------------------


def describe(machine: Machine) -> dict[str, Fact]:
    device = machine.device
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "ranks": machine.world.size,
        "threads": torch.get_num_threads(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "import_seconds": import_seconds(),
    }


def cpu_name() -> str:
    """Name, family and model: a virtual machine often tells no more of the name than its maker's."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    told = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", info.read_text(), re.M))
    return f"{told.get('model name', platform.machine())} ({told.get('cpu family')}/{told.get('model')})"


def commit() -> str:
    """Of the repository that this file stands in; + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return (found or "unknown") + ("+" if changed else "")


@cache
def import_seconds() -> float:
    """What a fresh process takes to import all that training needs."""
    program = "import time; began = time.perf_counter(); import training.setup; print(time.perf_counter() - began)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def headline(machine: dict[str, Fact]) -> str:
    return (
        f"commit {machine['commit']}, {machine['date']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {machine['gpu'] or machine['cpu']}, {machine['ranks']} process(es) of "
        f"{machine['threads']} threads, {machine['dtype']}; import {machine['import_seconds']:.1f} s"
    )


# Tables --------------------------------------------------------------------------------------------------------------

HEADER = ("line", "ours", "least..most", "transformers", "ours / theirs", "of own products", "of 2048^3")
MORE = ("peak MB, ours / theirs", "first update s, ours / theirs")
EXPLAINED = (
    "Medians over updates; the first is timed apart. of own products: 6 N operations a token, N the parameters of "
    "matrix products, as a share of the rate measured between the updates at the model's own shapes; in brackets "
    "theirs. MFU counts attention too, of the data sheet's peak."
)


def rows(lines: list[Line]) -> list[list[str]]:
    """Header first."""
    on_card = any(each.ours.mfu is not None for each in lines)
    table = [[*HEADER, *(["MFU"] if on_card else []), *MORE]]
    for each in lines:
        ours, theirs = each.ours, each.theirs
        beside = {name: getattr(theirs, name, None) for name in vars(ours)}
        cells = [
            f"{each.name}, {each.unit}/s",
            number(ours.per_second),
            f"{number(ours.low)}..{number(ours.high)}",
            number(beside["per_second"]),
            f"{each.ratio[0]:.2f} ({each.ratio[1]:.2f}..{each.ratio[2]:.2f})" if each.ratio else "-",
            share(ours.own_share, beside["own_share"], each.own_rate),
            share(ours.square_share, beside["square_share"], each.square_rate),
        ]
        cells += [percent(ours.mfu)] if on_card else []
        cells += [both(ours.peak_mb, beside["peak_mb"], "{:,.0f}")]
        cells += [both(ours.first_seconds, beside["first_seconds"], "{:.2f}")]
        table.append(cells)
        if each.weighed:
            more = [f"{each.name}, {each.weighed}/s", number(ours.weight_per_second), ""]
            more += [number(beside["weight_per_second"])]
            table.append(more + [""] * (len(cells) - len(more)))
    return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def both(ours: float | None, theirs: float | None, form: str) -> str:
    if ours is None:
        return "-"
    return form.format(ours) + (f" / {form.format(theirs)}" if theirs is not None else "")


def share(ours: float | None, theirs: float | None, rate: float | None) -> str:
    if ours is None or rate is None:
        return "-"
    beside = f" ({percent(theirs)})" if theirs is not None else ""
    return f"{percent(ours)}{beside} of {rate / 1e9:,.0f} GFLOP/s"


def show(table: list[list[str]], title: str = "") -> None:
    """On stdout; cells are broken rather than cut."""
    grid = Table(*table[0], title=title or None, title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for cells in table[1:]:
        grid.add_row(*cells)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False).print(grid, markup=False)


def markdown(table: list[list[str]]) -> str:
    lines = [table[0], ["---"] + ["--:"] * (len(table[0]) - 1), *table[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# An earlier run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    machine: dict[str, Fact]
    lines: list[Line] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Run:
    """What `save` wrote. Raises FileNotFoundError, and ValueError for another file."""
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sides = ("ours", "theirs")
        lines = [
            Line(**each | {side: Measured(**each[side]) for side in sides if each[side] is not None})
            for each in told["lines"]
        ]
        return Run(told["machine"], lines)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: found no run of this benchmark ({error}), expected what --json wrote") from None


def differences(earlier: Run, now: Run) -> list[str]:
    """Why two runs are not the same work on the same machine, in words."""
    found = [
        f"{name}: {earlier.machine.get(name)} then, {now.machine.get(name)} now: the speeds are not comparable"
        for name in WHERE
        if earlier.machine.get(name) != now.machine.get(name)
    ]
    for before, after in common(earlier, now):
        other = [
            f"{name} {before.shape.get(name)} then, {after.shape.get(name)} now"
            for name in {**before.shape, **after.shape}
            if before.shape.get(name) != after.shape.get(name)
        ]
        found += [f"{after.name}: not the same work: {', '.join(other)}"] if other else []
    names = [{each.name for each in run.lines} for run in (earlier, now)]
    found += [f"{name}: only in one of the two runs" for name in sorted(names[0] ^ names[1])]
    return found


def common(earlier: Run, now: Run) -> Iterable[tuple[Line, Line]]:
    before = {each.name: each for each in earlier.lines}
    return [(before[each.name], each) for each in now.lines if each.name in before]


def compared(earlier: Run, now: Run) -> list[list[str]]:
    """Header first: how much faster each line is. A ratio to transformers is the fairer one where the machine was not
    equally fast in both runs."""
    table = [["line", "earlier", "now", "now / earlier", "ours / theirs", "of own products", "peak MB"]]
    for before, after in common(earlier, now):
        ratios = [f"{each.ratio[0]:.2f}" if each.ratio else "-" for each in (before, after)]
        shares = [percent(each.ours.own_share) for each in (before, after)]
        peaks = [both(each.ours.peak_mb, None, "{:,.0f}") for each in (before, after)]
        table.append(
            [
                f"{after.name}, {after.unit}/s",
                number(before.ours.per_second),
                number(after.ours.per_second),
                f"{after.ours.per_second / before.ours.per_second:.2f}",
                " -> ".join(ratios),
                " -> ".join(shares),
                " -> ".join(peaks),
            ]
        )
    return table
