"""How fast is it here? Stages and flags in; real tokens a second, shares of this machine's ceiling, and the ratio to
transformers' own model doing the same work out.

    python scripts/benchmark.py                                             all stages on the sample data, dim 512
    python scripts/benchmark.py --stages pretrain dpo --data_path corpus.jsonl pairs.jsonl --dtype bfloat16
    python scripts/benchmark.py --json after.json --compare before.json     ratios to an earlier run

Real rows, the real engine, random weights; nothing is saved but what --json and --profile name. Beside each update of
ours one of transformers' model is made by a plain loop on padded batches (benchmark_baseline.py), and the machine's
matrix-product rate is measured (benchmark_clock.py). docs/benchmarks.md says how to read the table.
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from dataset.loader import PairRows
from dataset.records import expand_paths, form_of
from model import generate
from scripts import benchmark_report as report
from scripts.benchmark_baseline import TheirGeneration, Theirs, has_baseline, their_batches
from scripts.benchmark_clock import Rates, Timed, Turns, Work, products, wait
from scripts.benchmark_profile import profiled
from training import ALONE, build_engine, load_config
from training.config import Config
from training.engines import Machine
from training.loop import informed
from training.metrics import known_peak
from training.objectives import Objective
from training.setup import Data, Start, load_data, run_stage, start_machine, starting_model

PARTS = (*ALONE, "decode", "input")
UPDATES = 5  # measured, where --max_steps does not say
DECODED = {"greedy": (0.0, 1.0), "sampled": (0.7, 0.9)}  # temperature and top_p; the latter are eval_model.py's
TOKENIZED = 32 << 20  # bytes of data files, at most, that are tokenized anew to time it


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own flags, and those left over, which are the stages'."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="All other flags are the stages' (docs/flags.md): shape, batch, --dtype, --device, --compile ... "
        f"--max_steps are the updates measured [{UPDATES}]; what is validated, saved and reported does not count.",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=PARTS, default=list(PARTS), metavar="STAGE",
                        help=f"of {', '.join(PARTS)} [all]")  # fmt: skip
    parser.add_argument("--data_path", nargs="+", default=[], metavar="FILE",
                        help="each goes to the stages that read its rows [the sample data]")  # fmt: skip
    parser.add_argument("--prompt_tokens", type=int, default=64, help="decode: tokens of a prompt [64]")
    parser.add_argument("--new_tokens", type=int, default=64, help="decode: tokens to generate [64]")
    parser.add_argument("--no_baseline", "--no-baseline", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="ratios to what an earlier --json wrote")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown too")
    parser.add_argument("--profile", type=Path, nargs="?", const=Path("out/benchmark"), metavar="FOLDER",
                        help="trace one more update of each stage: where its time goes [out/benchmark]")  # fmt: skip
    return parser.parse_known_args(argv)


def configs(arguments: argparse.Namespace, rest: list[str]) -> dict[str, Config]:
    """What each stage is to be run with, by name: those asked for; all where only decode or input is.

    Raises ValueError for a stage that none of the files given is for.
    """
    names = [name for name in ALONE if name in arguments.stages] or list(ALONE)
    forms = {path: form_of(path) for path in (expand_paths(arguments.data_path) if arguments.data_path else ())}
    found = {}
    for name in names:
        form = ALONE[name].form
        files = [path for path, each in forms.items() if each is form]
        if forms and not files:
            raise ValueError(f"--data_path: no file has rows of {name}, {form.expected}; give one, or name --stages")
        config = load_config(ALONE[name].config, [*rest, *(["--data_path", *files] if files else [])])
        same = config.optimizer or "adamw"  # as the other side's, unless told
        found[name] = replace(
            config, init_from="none", val_fraction=0.0, max_steps=config.max_steps or UPDATES, optimizer=same
        )
    return found


def load(config: Config, machine: Machine) -> tuple[Start[Any], Data]:
    """Model, weights and rows. What is said of the rows goes to stderr: stdout has the results."""
    start = starting_model(config)
    with contextlib.redirect_stdout(sys.stderr):
        data = load_data(start, machine)
    for rows in (rows for loader in data.parts for rows in (loader.rows, loader.rows.beside)):
        if isinstance(rows, PairRows):  # any numbers are as fast
            rows.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)
    return start, data


# Training ------------------------------------------------------------------------------------------------------------


class Ours:
    """Updates by the doors that training uses."""

    def __init__(self, start: Start[Any], data: Data, machine: Machine, objective: Objective[Any]):
        self.loader, self.objective, self.learning_rate = data.train, objective, start.config.learning_rate
        self.engine = build_engine(start.model, start.config, machine, start.weights)

    def prepare(self, step: int) -> Callable[[], Work]:
        position = step * self.loader.rows_per_update
        return partial(self.update, position, self.loader.update(position))

    def update(self, position: int, batches: list[Any]) -> Work:
        objective = informed(self.engine, self.objective, self.loader, [position])
        totals = self.engine.forward_backward(batches, objective)
        self.engine.step(self.learning_rate)
        here = float(sum(batch.real_tokens for batch in batches))
        return Work(self.engine.sum_over_ranks([here])[0] / self.engine.world.model_size, totals.read().weight)

    def kept(self) -> Iterator[object]:
        yield from self.engine.model.parameters()
        for optimizer in self.engine.optimizers:
            yield from (value for state in optimizer.state.values() for value in state.values())


def training_line(start: Start[Any], data: Data, machine: Machine, baseline: bool, profile: Path | None) -> report.Line:
    config, shape, row = start.config, start.model.config, data.train.capacity
    objective = ALONE[config.stage].objective(config)
    rates = Rates(products(start.model), data.train.batch_size * row, machine.device, machine.dtype)
    turns = Turns(machine.device, rates.measure)
    turns.start("ours", lambda: Ours(start, data, machine, objective))
    if baseline and has_baseline(objective):
        turns.start("theirs", lambda: Theirs(start, data, machine, objective))
    for step in range(1, config.max_steps + 1):
        turns.go_round(step)
    if profile:
        groups = {
            name: profiled(side.prepare(config.max_steps + 1), machine.device, profile / f"{config.stage}_{name}.json")
            for name, side in turns.sides.items()
        }
        show_groups(config.stage, groups, profile)
    same = ("accumulation_steps", "engine", "optimizer", "compile", "grad_checkpointing", "zero_stage", "offload")
    told = asdict(shape) | {"row": row, "batch_size": data.train.batch_size}
    told |= {name: getattr(config, name) for name in same} | {"data": data.train.rows.encoded.fingerprint}
    found = report.line(config.stage, "real tokens", told, turns.timed, objective.unit)
    peak = known_peak(torch.cuda.get_device_name(machine.device), machine.dtype) if on_card(machine) else None
    report.add_ceiling(found, rates, machine.world.size, shape, start.max_seq_len, peak)
    return found


def show_groups(stage: str, groups: dict[str, dict[str, float]], folder: Path) -> None:
    """Milliseconds of one update, and their share."""
    table = [["where the time goes", *(f"{name}, ms" for name in groups)]]
    for group in next(iter(groups.values())):
        spent = [(each[group], sum(each.values())) for each in groups.values()]
        table.append([group, *(f"{part * 1e3:,.1f} ({part / max(whole, 1e-9):.0%})" for part, whole in spent)])
    report.show(table, f"{stage}, one update; traces and operations in {folder}")


# Decoding ------------------------------------------------------------------------------------------------------------


class OurGeneration:
    """model.generate of a batch of prompts."""

    def __init__(self, start: Start[Any], machine: Machine, prompts: list[list[int]], **settings: Any):
        self.model = start.model.to_empty(device="cpu")
        self.model.load_state_dict(dict(start.weights()))
        self.model.to(machine.device, machine.dtype).eval()
        self.prompts, self.settings = prompts, settings

    def prepare(self, step: int) -> Callable[[], Work]:
        return self.update

    def update(self) -> Work:
        answers = generate(self.model, self.prompts, seed=0, **self.settings)
        return Work(sum(len(answer.ids) for answer in answers))

    def kept(self) -> Iterator[object]:
        yield from self.model.parameters()


def decode_lines(config: Config, machine: Machine, arguments: argparse.Namespace) -> Iterator[report.Line]:
    """New tokens a second for 1 and 32 rows at once, greedy and sampled; random weights, prompts of random tokens."""
    for rows in (1, 32):
        for how, (temperature, top_p) in DECODED.items():
            start = starting_model(config)
            size = (rows, arguments.prompt_tokens)
            ids = torch.randint(start.model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
            settings = {"max_new_tokens": arguments.new_tokens, "temperature": temperature, "top_p": top_p}
            turns = Turns(machine.device)
            turns.start("ours", partial(OurGeneration, start, machine, ids.tolist(), **settings))
            if not arguments.no_baseline:
                turns.start("theirs", partial(TheirGeneration, start, machine, ids.tolist(), **settings))
            for step in range(1, config.max_steps + 1):
                turns.go_round(step)
            shape = asdict(start.model.config) | settings | {"rows": rows, "prompt": arguments.prompt_tokens}
            yield report.line(f"decode {rows} row{'s' * (rows > 1)}, {how}", "new tokens", shape, turns.timed)


# Input ---------------------------------------------------------------------------------------------------------------


class Batches:
    """Nothing but the making of batches, `at_least` seconds of it a turn."""

    def __init__(self, make: Callable[[], int], at_least: float = 0.1):
        self.make, self.at_least = make, at_least

    def prepare(self, step: int) -> Callable[[], Work]:
        return self.update

    def update(self) -> Work:
        """make: one update's, or batch's, real tokens."""
        tokens, end = 0, time.perf_counter() + self.at_least
        while time.perf_counter() < end:
            tokens += self.make()
        return Work(tokens)

    def kept(self) -> Iterator[object]:
        yield from ()


def input_lines(start: Start[Any], data: Data, machine: Machine, baseline: bool) -> Iterator[report.Line]:
    """Collating alone, in one process; and tokenizing, where the files are not large."""
    stage, loader, positions, cpu = start.config.stage, data.train, count(), torch.device("cpu")
    shape: dict[str, report.Fact] = {
        "row": loader.capacity, "batch_size": loader.batch_size, "data": loader.rows.encoded.fingerprint
    }  # fmt: skip

    def update() -> int:
        return sum(batch.real_tokens for batch in loader.update(next(positions) * loader.rows_per_update))

    turns = Turns(cpu)
    turns.start("ours", lambda: Batches(update))
    if baseline:
        theirs = their_batches(start, data)
        turns.start("theirs", lambda: Batches(lambda: next(theirs).real_tokens))
    for step in range(1, start.config.max_steps + 1):
        turns.go_round(step)
    yield report.line(f"input {stage}, collating", "real tokens", shape, turns.timed, model=False)
    size = sum(Path(path).stat().st_size for path in expand_paths(start.config.data_path))
    if size <= TOKENIZED and machine.world.size == 1:
        timed = {"ours": tokenized(start, machine, size)}
        yield report.line(f"input {stage}, tokenizing", "MB", {"data": shape["data"]}, timed, model=False)


def tokenized(start: Start[Any], machine: Machine, size: int) -> Timed:
    """Into caches of their own, three times; the files lie in memory by now. size: of the files, bytes."""
    timed = Timed(0.0)
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            fresh = replace(start, config=replace(start.config, cache_dir=folder))
            began = time.perf_counter()
            load_data(fresh, machine)
            timed.seconds.append(time.perf_counter() - began)
            timed.work.append(Work(size / 1e6))
    return timed


# All together --------------------------------------------------------------------------------------------------------


def on_card(machine: Machine) -> bool:
    return machine.device.type == "cuda"


def measure(arguments: argparse.Namespace, asked: dict[str, Config], machine: Machine) -> list[report.Line]:
    """Lines in the order of PARTS."""
    several = machine.world.size > 1
    trained: list[report.Line] = []
    inputs: list[report.Line] = []

    def ready(line: report.Line) -> report.Line:
        if machine.world.rank == 0:
            print(f"{line.name}: {report.number(line.ours.per_second)} {line.unit}/s", file=sys.stderr, flush=True)
        return line

    for name, config in asked.items():
        start, data = load(config, machine)
        baseline = not arguments.no_baseline and not several  # the other side knows one process only
        if "input" in arguments.stages:
            inputs += map(ready, input_lines(start, data, machine, baseline))
        if name in arguments.stages:
            profile = None if several else arguments.profile
            trained.append(ready(training_line(start, data, machine, baseline, profile)))
        gc.collect()
        if on_card(machine):
            wait(machine.device)
            torch.cuda.empty_cache()
    decoding = "decode" in arguments.stages and not several
    decoded = decode_lines(next(iter(asked.values())), machine, arguments) if decoding else ()
    return [*trained, *map(ready, decoded), *inputs]


def main(arguments: argparse.Namespace, rest: list[str], config: Config) -> None:
    """config: of the first stage, whose device and precision hold for all."""
    earlier = report.read(arguments.compare) if arguments.compare else None
    asked = configs(arguments, rest)
    machine = start_machine(config)
    lines = measure(arguments, asked, machine)
    if machine.world.rank:
        return
    run = report.Run(report.describe(machine), lines)
    table = report.rows(lines)
    print(report.headline(run.machine))
    report.show(table)
    print(report.EXPLAINED)
    if arguments.markdown:
        print(f"\n{report.headline(run.machine)}\n\n{report.markdown(table)}")
    if arguments.json:
        run.save(arguments.json)
    if earlier:
        for difference in report.differences(earlier, run):
            print(f"warning: {difference}")
        report.show(report.compared(earlier, run), f"beside {arguments.compare}")


if __name__ == "__main__":
    own, others = parse(sys.argv[1:])
    first = next((name for name in ALONE if name in own.stages), next(iter(ALONE)))
    sys.argv[1:] = others
    run_stage(partial(main, own, others), ALONE[first].config, __doc__)
