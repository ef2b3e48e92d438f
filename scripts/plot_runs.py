"""Curves of several runs over each other, the figures they ended with, and the flags in which they differ.

    python scripts/plot_runs.py out/full_sft_512 out/faster                 -> runs.png, and

                        full_sft_512    faster
    loss                       1.844     1.792
    val_loss                   1.901     1.873
    ...
    learning_rate             0.0005     0.001

A thin line is what was logged, a thick one its running mean, a dashed one held-out rows. A run may still be going on.
"""

import argparse
import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from rich.console import Console
from rich.table import Table

from training.config import model_folder, relative

if TYPE_CHECKING:  # imported where they are used: they take seconds, and neither --help nor a wrong flag needs them
    from matplotlib.axes import Axes

    from training.metrics import Record

PANELS = {  # metric -> its axis; a panel is there where a run has its metric, of training or of held-out rows
    "loss": "loss (nats)",
    "bpb": "bits per byte",
    "reward": "reward",
    "reward_margin": "reward margin",
    "pass_at_1": "pass@1",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s",
}
LAST = (
    "step", "epoch", "loss", "val_loss", "val_bpb", "reward", "val_reward", "pass_at_1", "reward_margin",
    "val_reward_accuracy", "grad_norm", "tokens", "seconds", "memory_mb",
)  # fmt: skip
"""The figures of the table, as they were measured last."""


class Run(NamedTuple):
    name: str
    records: "list[Record]"
    flags: dict[str, object]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user did wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or their names in --out_dir")
    parser.add_argument("--out_dir", default="out", help="where runs are looked for by name [out]")
    parser.add_argument("--along", choices=("step", "tokens", "seconds"), default="step", help="the x axis [step]")
    parser.add_argument("--metrics", nargs="+", choices=PANELS, default=list(PANELS), help="panels [all there are]")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), metavar="FILE.png", help="[runs.png]")
    arguments = parser.parse_args(argv)
    try:
        runs = read_runs([model_folder(each, arguments.out_dir) for each in arguments.runs])
        draw(runs, arguments.output, arguments.along, arguments.metrics)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 60 + 20 * len(runs), highlight=False)
    console.print(table("last figures", runs, figures(runs)))
    if differing := differences(runs):
        console.print(table("flags that differ", runs, differing))
    console.print(f"curves: {arguments.output}", soft_wrap=True)
    return 0


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises FileNotFoundError for a folder that is no run's, ValueError for one that has logged nothing yet."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    same = len(set(names)) < len(names)  # runs of several out_dirs, or one given twice
    return [read_run(path, f"{path.parent.name}/{path.name}" if same else path.name) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    from training.metrics import read_records

    logged, config = folder / "metrics.jsonl", folder / "config.yaml"
    for path in (logged, config):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; expected the folder of a run, which has it from its start")
    records = read_records(logged)
    if not records:
        raise ValueError(f"{logged}: no whole line yet; a run writes one every --log_interval steps")
    lines = logged.read_bytes().split(b"\n")
    if broken := sum(bool(line.strip()) for line in lines) - len(records):
        print(f"{logged}: {broken} of {len(lines)} lines are torn or no records, and left out", file=sys.stderr)
    if gaps := sum(record.get("loss") is None for record in records):
        print(f"{logged}: {gaps} of {len(records)} lines have no finite loss: a gap in the curve", file=sys.stderr)
    return Run(name, records, yaml.safe_load(config.read_text(encoding="utf-8")) or {})


# The table --------------------------------------------------------------------------------------------------------


def figures(runs: list[Run]) -> dict[str, list[str]]:
    """By name, a value a run: the last that was measured, and the median of speeds, of which each is that of one line
    alone. Names that no run has are left out."""
    rows = {name: [last(run, name) for run in runs] for name in LAST}
    rows["tokens_per_second (median)"] = [middle(run, "tokens_per_second") for run in runs]
    return {name: row for name, row in rows.items() if set(row) != {"-"}}


def last(run: Run, name: str) -> str:
    found = [record[name] for record in run.records if record.get(name) is not None]
    return shown(found[-1]) if found else "-"


def middle(run: Run, name: str) -> str:
    found = [record[name] for record in run.records if record.get(name) is not None]
    return shown(statistics.median(found)) if found else "-"


def shown(number: float) -> str:
    """1234567 -> "1,234,567", 1234.56 -> "1,235", 1.23456 -> "1.2346"."""
    return f"{number:,.0f}" if isinstance(number, int) or abs(number) >= 1000 else f"{number:.4f}"


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Flags of which two runs have another value, "-" for not given; a run's name is above its column already."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name != "run_name")
    rows = {name: [relative(run.flags.get(name, [])) or "-" for run in runs] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def table(title: str, runs: list[Run], rows: dict[str, list[str]]) -> Table:
    grid = Table(title, *(run.name for run in runs))
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        grid.add_row(name, *row)
    return grid


# The picture ------------------------------------------------------------------------------------------------------


def draw(runs: list[Run], path: Path, along: str = "step", metrics: Collection[str] = PANELS) -> None:
    """One panel a metric, one colour a run. Raises ValueError where no run has one of the metrics, and OSError where
    the picture cannot be written."""
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no state

    from training.metrics import held_out_name

    has = {name for run in runs for record in run.records for name, value in record.items() if value is not None}
    panels = [name for name in PANELS if name in metrics and has & {name, held_out_name(name)}]
    if not panels:
        raise ValueError(f"no run has logged {' or '.join(metrics)}; give others with --metrics")
    figure = Figure(figsize=(9, 2.6 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        for i, run in enumerate(runs):
            add_run(axis, run, name, along, f"C{i % 10}")
        axis.set(ylabel=PANELS[name])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[-1].set(xlabel=along)
    figure.savefig(path)


def add_run(axis: "Axes", run: Run, name: str, along: str, color: str) -> None:
    from training.metrics import curve, held_out_name, smooth

    held_out = held_out_name(name)
    at, values = curve(run.records, name, along) if held_out != name else ([], [])
    few = "." if len(at) < 3 else None
    axis.plot(at, values, color=color, alpha=0.25, linewidth=1, marker=few)
    axis.plot(at, smooth(values), color=color, linewidth=1.6, label=run.name)
    axis.plot(*curve(run.records, held_out, along), color=color, linestyle="--", marker="o", markersize=3)


if __name__ == "__main__":
    sys.exit(main())
