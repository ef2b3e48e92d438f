"""What a run reports: records in; metrics.jsonl, a progress bar, loss.png and, if asked for, wandb and TensorBoard out.

    metrics.log({"step": 20, "loss": 3.214, "lr": 5e-4, "tokens_per_second": 51200.0, "mfu": 0.031, "memory_mb": 812.0})

    metrics.jsonl  {"step": 20, "loss": 3.214, "lr": 0.0005, "tokens_per_second": 51200.0, "mfu": 0.031, ...}
    terminal       pretrain   2%|▏    | 20/1000 [00:32<26:08, loss 3.2140, lr 5.0e-04, 51.2k tokens/s, MFU 3.1%, 812 MB]
    log file       pretrain step 20/1000, loss 3.2140, lr 5.0e-04, 51.2k tokens/s, MFU 3.1%, 812 MB, 26:08 left

Everything is shown on stderr. A number that is not finite is written as null, since JSON has no NaN and no infinity.
Once a run has begun no log can end it: one that cannot be written is told once, and tried again with the next record.
"""

import contextlib
import html
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, SupportsFloat

import torch
from tqdm import tqdm

if TYPE_CHECKING:  # both are imported where they are used: they are extras, and take seconds
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

Record = dict[str, Any]  # metrics of a step, or settings of a run, by name
HELD_OUT_ALONE = ("pass_at_1", "pass_at_8")  # names that say so much; of others, what is held out begins with val_


def held_out_name(name: str) -> str:
    """What a metric is called of held-out rows."""
    return name if name in HELD_OUT_ALONE else f"val_{name}"


class Metrics:
    """The reports of one run, made by rank 0; with `enabled` false every method returns at once.

    Use it as a context manager, or call close() in a `finally`: loss.png is drawn and wandb told how the run ended
    whether it went well or not.

    start_step > 0 continues a run. Lines of metrics.jsonl after that step are removed, since those steps are made
    again; a line torn by a kill is removed too. The same wandb run goes on; steps it already has are not sent twice.
    start_step 0 begins anew: an earlier metrics.jsonl is replaced, and wandb gets a new run.

    Raises ValueError where wandb or TensorBoard cannot be started, saying how to go on.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Record,
        *,
        stage: str,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        use_wandb: bool = False,
        wandb_project: str = "seedling",
        wandb_run_name: str | None = None,
        use_tensorboard: bool = False,
    ):
        self.enabled = enabled
        if not enabled:
            return
        self.run_dir, self.stage = Path(run_dir), stage
        self.step, self.start_step, self.total_steps = start_step, start_step, total_steps
        self.run_dir.mkdir(parents=True, exist_ok=True)
        earlier = read_records(self.run_dir / "metrics.jsonl") if start_step else []
        self.records = [record for record in earlier if record["step"] <= start_step]
        self.wandb: Run | None = None
        self.tensorboard: SummaryWriter | None = None
        self.sent_step = 0  # the last step that the wandb run has from an earlier start
        if use_wandb:
            continued = start_step > 0 and (self.run_dir / "wandb_run_id").is_file()
            self.sent_step = max((record["step"] for record in earlier), default=0) if continued else 0
            self.wandb = start_wandb(self.run_dir, config, wandb_project, wandb_run_name, continued)
        if use_tensorboard:
            self.tensorboard = start_tensorboard(self.run_dir, start_step)
        self.file = replace_records(self.run_dir / "metrics.jsonl", self.records)
        self.unwritten = b""  # what a full disk has not taken yet
        self.failed: set[str] = set()  # logs of which it was told that they cannot be written
        self.bar = None
        if sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(
                desc=stage, total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=form, smoothing=0.05
            )
        self.started = time.monotonic()
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def log(self, record: Record) -> None:
        """Take in one step's record: `step`, and any of the names in the docstring of this file and more."""
        if not self.enabled:
            return
        plain: Record = {name: plain_value(value) for name, value in record.items()}
        self.records.append(plain)
        self.unwritten += line(plain)
        self.write()
        self.advance(plain["step"])
        self.show(plain)
        step, values = plain["step"], {k: v for k, v in plain.items() if k != "step" and v is not None}
        if self.wandb is not None and step > self.sent_step:
            with self.going_on("wandb"):
                self.wandb.log(values, step=step)
        if self.tensorboard is not None:
            with self.going_on("TensorBoard's events"):
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self.tensorboard.add_scalar(name, value, step)

    def write(self) -> None:
        """Add what is not written yet to metrics.jsonl; a disk may take a part of it now and the rest later."""
        with self.going_on("metrics.jsonl"):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    @contextlib.contextmanager
    def going_on(self, log: str) -> Iterator[None]:
        """A log that cannot be written neither ends a run nor hides what did."""
        try:
            yield
        except Exception as error:
            if log not in self.failed:
                reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
                self.print(f"warning: {log} could not be written: {reason}; training goes on")
            self.failed.add(log)

    def advance(self, step: int) -> None:
        """Move the bar to a step that is not logged."""
        if not self.enabled or step <= self.step:
            return
        self.step = step
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, record: Record) -> None:
        """The record on the bar, or as one line where stderr is no terminal."""
        if self.bar is not None:
            self.bar.set_postfix_str(summary(record))
            return
        line = f"{self.stage} step {record['step']}/{self.total_steps}, {summary(record)}"
        done = self.step - self.start_step
        if done:
            left = (time.monotonic() - self.started) / done * (self.total_steps - self.step)
            line += f", {tqdm.format_interval(left)} left"
        self.print(line)

    def print(self, text: str) -> None:
        """Show a text above the bar, unless stderr is a file on a full disk."""
        if self.enabled:
            with contextlib.suppress(OSError):
                tqdm.write(text, file=sys.stderr)
                sys.stderr.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show what the model writes at this step, after `prompt`."""
        if not self.enabled:
            return
        self.print(f"step {step}, sample: {prompt} ▸ {text}")
        if self.wandb is not None and step > self.sent_step:
            import wandb

            page = f"<p><b>{html.escape(prompt)}</b></p><pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
            with self.going_on("wandb"):
                self.wandb.log({"sample": wandb.Html(page)}, step=step)
        if self.tensorboard is not None:
            with self.going_on("TensorBoard's events"):
                self.tensorboard.add_text("sample", f"{prompt}\n\n{text}", step)

    def close(self, failed: bool = False) -> None:
        """Draw loss.png, close files, finish wandb (as failed, if so) and TensorBoard. A second call does nothing."""
        if not self.enabled or self.closed:
            return
        self.closed = True
        self.write()
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        try:
            draw(self.records, self.run_dir / "loss.png", title=self.run_dir.name)
        except Exception as error:  # a picture must neither fail a run nor hide what did
            self.print(f"loss.png could not be drawn: {type(error).__name__}: {error}")
        if self.tensorboard is not None:
            with self.going_on("TensorBoard's events"):
                self.tensorboard.close()
        if self.wandb is not None:
            with self.going_on("wandb"):
                self.wandb.finish(exit_code=int(failed))


# metrics.jsonl --------------------------------------------------------------------------------------------------


def plain_value(value: SupportsFloat | str | None) -> int | float | str | bool | None:
    """A number (also a tensor's or NumPy's) or text as JSON can hold it: nan and the infinities become None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def read_records(path: Path) -> list[Record]:
    """The whole lines of a metrics.jsonl; one that is torn, or no record, is left out. [] where there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def replace_records(path: Path, records: Iterable[Record]) -> BinaryIO:
    """Write the records to `path`, whole or not at all; the file comes back open for more, without a buffer."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(b"".join(map(line, records)))
    os.replace(part, path)
    return path.open("ab", buffering=0)


def summary(record: Record) -> str:
    """{"step": 20, "loss": 3.2, "mfu": None} -> "loss 3.2000": what of a record is shown while training."""
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "loss": ("loss {}", "{:.4f}".format),
        "val_loss": ("val {}", "{:.4f}".format),
        "reward": ("reward {}", "{:.3f}".format),
        "val_reward": ("val reward {}", "{:.3f}".format),
        "pass_at_1": ("pass@1 {}", "{:.1%}".format),
        "reward_margin": ("margin {}", "{:.3f}".format),
        "reward_accuracy": ("accuracy {}", "{:.1%}".format),
        "lr": ("lr {}", "{:.1e}".format),
        "tokens_per_second": ("{} tokens/s", tqdm.format_sizeof),
        "mfu": ("MFU {}", "{:.1%}".format),
        "memory_mb": ("{} MB", "{:,.0f}".format),
    }
    parts = [form.format(write(record[name])) for name, (form, write) in shown.items() if record.get(name) is not None]
    if "loss" in record and record["loss"] is None:
        parts.insert(0, "loss not finite")
    return ", ".join(parts)


# wandb and TensorBoard ------------------------------------------------------------------------------------------


def start_wandb(run_dir: Path, config: Record, project: str, name: str | None, continued: bool) -> "Run":
    """A wandb run, the one named in run_dir/wandb_run_id where it is continued. Raises ValueError with a way out."""
    way_out = (
        "log in with `wandb login`, or set the environment variable WANDB_MODE=offline to keep the log on this disk "
        "(`wandb sync` sends it later), or leave --use_wandb out"
    )
    try:
        import wandb
    except ImportError:
        raise ValueError("--use_wandb needs the wandb package: `pip install wandb`, or leave --use_wandb out") from None
    id_file = run_dir / "wandb_run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if continued else secrets.token_hex(4)
    folder = os.environ.get("WANDB_DIR", str(run_dir))
    try:
        run = wandb.init(
            project=project, name=name or run_dir.name, id=run_id, resume="allow", config=config, dir=folder
        )
    except (wandb.Error, OSError) as error:
        raise ValueError(f"Weights & Biases could not be started ({error}); {way_out}") from error
    id_file.write_text(run_id + "\n", encoding="utf-8")
    return run


def start_tensorboard(run_dir: Path, start_step: int) -> "SummaryWriter":
    """A writer into run_dir/tensorboard that hides what an earlier run logged after start_step."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--use_tensorboard needs the tensorboard package: `pip install tensorboard`, or leave --use_tensorboard out"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0)


# loss.png -------------------------------------------------------------------------------------------------------


REWARDS = (("reward_margin", "reward_accuracy"), ("reward", "pass_at_1", "entropy"))  # curves of one panel, if any


def draw(records: list[Record], path: Path, title: str) -> None:
    """Loss of training and validation over the learning rate; of rewards, where there are some, curves between. Nothing
    for no records."""
    if not records:
        return
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no state

    curves = next((names for names in REWARDS if names[0] in records[-1]), ())
    heights = [1.5, 3, 1] if "reward" in curves else [3, 1.5, 1] if curves else [3, 1]  # a surrogate loss says little
    figure = Figure(figsize=(8, 1.6 * sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    steps, loss = curve(records, "loss")
    panels[0].plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=1, marker="." if len(steps) < 3 else None)
    panels[0].plot(steps, smooth(loss), color="tab:blue", linewidth=1.8, label=with_last("training", loss))
    steps, loss = curve(records, "val_loss")
    if steps:
        panels[0].plot(steps, loss, color="tab:orange", marker="o", markersize=4, label=with_last("validation", loss))
    panels[0].set(title=title, ylabel="loss (nats)")
    panels[0].legend(frameon=False)
    if curves:
        for name, color in zip(curves, ("tab:green", "tab:purple", "tab:orange"), strict=False):
            steps, values = curve(records, name)
            dots = "." if len(steps) < 3 else None
            panels[1].plot(steps, values, color=color, alpha=0.3, linewidth=1, marker=dots)
            label = with_last(name.replace("_", " "), values)
            panels[1].plot(steps, smooth(values), color=color, linewidth=1.8, label=label)
        panels[1].set(ylabel="reward")
        panels[1].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves))  # above all curves
    panels[-1].plot(*curve(records, "lr"), color="tab:gray")
    panels[-1].set(xlabel="step", ylabel="learning rate")
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def curve(records: list[Record], name: str, along: str = "step") -> tuple[list[float], list[float]]:
    """Steps (or tokens, or seconds) and values of one name, where both were measured and finite."""
    points = [(record.get(along), record.get(name)) for record in records]
    whole = [(x, y) for x, y in points if x is not None and y is not None]
    return [x for x, _ in whole], [y for _, y in whole]


def smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the curve; not pulled towards 0 at its start."""
    decay = 1 - 1 / max(1, len(values) / 50)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed


def with_last(name: str, values: list[float]) -> str:
    return f"{name} {values[-1]:.3f}" if values else name


# Memory and speed -----------------------------------------------------------------------------------------------

PEAK_TFLOPS: tuple[tuple[str, dict[torch.dtype, float]], ...] = tuple(
    (name, dict(zip((torch.bfloat16, torch.float16, torch.float32), peaks, strict=True)))
    for name, peaks in (
        # name, dense peaks of bf16, fp16 (both accumulating in fp32) and fp32 without TF32; nan: not in this hardware
        (r"H100 PCIe", (756, 756, 51)),
        (r"H100 NVL|H200 NVL", (835, 835, 60)),
        (r"H100 80GB HBM3|H100 SXM|H200", (989, 989, 67)),
        (r"B200", (2250, 2250, 75)),
        (r"A100", (312, 312, 19.5)),
        (r"L40S", (362, 362, 91.6)),
        (r"L4", (121, 121, 30.3)),
        (r"A10G", (70, 70, 35)),
        (r"A10", (125, 125, 31.2)),
        (r"T4", (math.nan, 65, 8.1)),
        (r"V100-SXM.*", (math.nan, 125, 15.7)),
        (r"V100-PCIE.*", (math.nan, 112, 14)),
        (r"RTX 3090", (71, 71, 35.6)),
        (r"RTX 4090", (165, 165, 82.6)),
        (r"RTX 5090", (209.5, 209.5, 104.8)),
    )
)
"""From NVIDIA's data sheets, in 10^12 floating-point operations a second, without sparsity."""

NOT_THE_WHOLE_CARD = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D|vGPU)\b")


def peak_memory_mb(device: torch.device | str) -> float:
    """Most memory used so far, MiB: allocated on the GPU, else resident in this process. 0 where that is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


@lru_cache
def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Floating-point operations a second this device can do at best: from the table, or else measured (~0.2 s)."""
    device = torch.device(device)
    # the table's float32 is without TF32, whose rate is measured where matrix products are allowed it
    tabled = device.type == "cuda" and (dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest")
    known = known_peak(torch.cuda.get_device_name(device), dtype) if tabled else None
    return measured_peak(device, dtype) if known is None else known


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """The table's peak for a GPU's name, operations a second; None where it is not there, or the GPU is only a part.

    known_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) -> 3.12e14
    """
    if NOT_THE_WHOLE_CARD.search(name):
        return None
    for pattern, peaks in PEAK_TFLOPS:
        if re.search(rf"\b({pattern})\b", name):
            peak = peaks.get(dtype, math.nan)
            return None if math.isnan(peak) else peak * 1e12
    return None


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product, operations a second, with the threads torch has now."""
    size = 512 if device.type == "cpu" else 4096
    a = b = torch.ones(size, size, device=device, dtype=dtype)  # not random: a run's random state stays as it is
    best, end = math.inf, 0.0
    while end == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if end == 0.0:  # the first product also loads kernels
            end = time.perf_counter() + seconds
            continue
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
