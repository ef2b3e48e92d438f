"""The one training loop, for every stage and every way of spreading.

    position 0 --update--> position 64 --update--> ...      a position counts rows over all ranks and epochs

An update is: this rank's micro-batches, the gradient of the global mean loss, one optimizer step. Everything that must
survive a kill is in `Progress`, the engine's state and the random state.
"""

import math
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataset import Loader, render_chat
from dataset.batch import Batch
from dataset.encode import start_document
from dataset.loader import Rows
from model import GPT, generate, save_pretrained
from training import checkpoint, distributed
from training.config import Config, save_config
from training.engines import SingleEngine
from training.metrics import Metrics, flops_per_token, peak_flops, peak_memory_mb
from training.objectives import Objective
from training.optimizer import learning_rate
from training.setup import Data

BAD_UPDATES = 3  # non-finite updates in a row that stop the run
BAD_UPDATES_FLOAT16 = 25  # the loss scaler halves its scale at each, which is how it finds the right one


@dataclass
class Progress:
    """Where a run stands; saved in run.json."""

    step: int = 0
    position: int = 0
    tokens: int = 0  # supervised tokens seen
    seconds: float = 0.0  # spent training, over all resumed parts


def train(
    engine: SingleEngine, objective: Objective, data: Data, tokenizer: Any, config: Config, identity: dict[str, Any]
) -> None:
    """Train from the newest checkpoint (config.resume) to the end; leaves a model folder in config.run_dir.

    `identity` holds what must be equal for a resumed run to continue this one exactly (data, seed, shape, start).
    Raises ValueError for a checkpoint of another identity, and after several non-finite updates in a row.
    """
    run = Run(engine, objective, data, tokenizer, config, identity)
    try:
        with run.metrics:
            run.loop()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if distributed.is_lost_contact(error):
            raise ValueError(
                f"rank {engine.world.rank} lost contact with another rank after step {run.progress.step} ({str(error).splitlines()[0]}); the newest "
                "checkpoint stands, and the same command goes on from it (torchrun --max_restarts N does so by itself)"
            ) from error
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(
            "(out of|enough|allocate) memory", str(error)
        ):
            raise
        raise ValueError(
            f"out of memory on {engine.device} at step {run.progress.step}: lower --batch_size (now {config.batch_size}; raise --accumulation_steps "
            f"by the same factor to keep the update the same), then --max_seq_len (now {config.max_seq_len}), or give --grad_checkpointing"
        ) from error


class Run:
    """The loop and its helpers. Built by `train`."""

    def __init__(
        self,
        engine: SingleEngine,
        objective: Objective,
        data: Data,
        tokenizer: Any,
        config: Config,
        identity: dict[str, Any],
    ):
        self.engine, self.objective, self.data, self.tokenizer = engine, objective, data, tokenizer
        self.config, self.identity = config, identity
        self.first = engine.world.rank == 0
        checkpoint.share_folder(engine, config.run_dir)
        self.flops_per_token = flops_per_token(engine.model.config, config.max_seq_len or 0)
        self.peak_flops = peak_flops(engine.device, engine.dtype) * engine.world.size
        self.loader = Loader(
            data.train, config.batch_size, config.accumulation_steps, engine.world.rank, engine.world.size, config.seed,
            rows_per_update=config.global_batch_size,
        )  # fmt: skip
        # dropout differs between ranks; nothing random before this counts
        torch.manual_seed(config.seed + engine.world.rank)
        self.progress = self.resume()
        self.total_steps = self.plan()
        self.metrics = Metrics(
            config.run_dir, asdict(config), stage=config.stage, total_steps=self.total_steps, start_step=self.progress.step,
            enabled=self.first, use_wandb=config.use_wandb, wandb_project=config.wandb_project,
            wandb_run_name=config.wandb_run_name or config.run_dir.name, use_tensorboard=config.use_tensorboard,
        )  # fmt: skip
        self.bad_updates = 0
        self.saved_step = self.progress.step if self.progress.step else -1
        self.saving: checkpoint.Saving | None = None
        self.window = Window()

    def plan(self) -> int:
        """Steps at the end of the run. Counted from where the run stands, so that another number of ranks changes the
        size of what is left to do, and a run left alone has the same plan at every resume."""
        per_update = self.loader.rows_per_update
        if self.config.max_steps:
            left = max(0, self.config.max_steps - self.progress.step)
            self.loader.total_rows = self.progress.position + left * per_update
        else:
            self.loader.total_rows = round(len(self.data.train) * self.config.epochs)
            left = max(0, math.ceil((self.loader.total_rows - self.progress.position) / per_update))
        return self.progress.step + left

    def loop(self) -> None:
        config, progress, engine = self.config, self.progress, self.engine
        if progress.step >= self.total_steps:
            self.say(
                f"this run is complete at step {progress.step}; raise --epochs or --max_steps to go on, or start over with --resume none"
            )
        if self.first:
            save_config(config, config.run_dir / "config.yaml")
        distributed.set_timeout(timedelta(seconds=config.comm_timeout))
        with StopSignals() as stop, ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self.loader.update, progress.position)
            self.window.start()
            while progress.step < self.total_steps:
                micro_batches, upcoming = self.next_update(upcoming, pool)
                rate = learning_rate(progress.step, self.total_steps, config)
                sums, weight = engine.forward_backward(micro_batches, self.objective)
                norm = engine.step(rate)
                counts = [
                    stop.requested,
                    sum(b.real_tokens for b in micro_batches),
                    sum(b.supervised for b in micro_batches),
                    self.saving is not None and self.saving.done(),
                ]
                stopped, real, supervised, written = engine.sum_over_ranks([float(count) for count in counts])
                progress.step += 1
                progress.position = min(progress.position + self.loader.rows_per_update, self.loader.total_rows or 0)
                progress.tokens += int(supervised)
                self.window.add(sums, weight, real)
                self.check_finite(norm, sums, micro_batches)
                self.report(rate, norm, bool(stopped))
                if stopped:
                    break
                if written == engine.world.size:
                    self.advance_save()
                if due(progress.step, config.save_interval) and progress.step < self.total_steps:
                    self.save(last=False)
            self.save()  # in here: a second signal while it writes must not cost it
        if progress.step < self.total_steps:
            self.say(f"stopped at step {progress.step} of {self.total_steps}; the same command continues from here")
        else:
            self.say(f"model folder: {config.run_dir}")

    def next_update(
        self, upcoming: "Future[list[Batch]]", pool: ThreadPoolExecutor
    ) -> tuple[list[Batch], "Future[list[Batch]]"]:
        """This update's micro-batches; the next ones are put together meanwhile."""
        micro_batches = upcoming.result()
        return micro_batches, pool.submit(self.loader.update, self.progress.position + self.loader.rows_per_update)

    # --- what is said ---

    def say(self, text: str) -> None:
        if hasattr(self, "metrics"):
            self.metrics.print(text)
        elif self.first:
            print(text, flush=True)

    def report(self, rate: float, norm: float, stopped: bool) -> None:
        """Log, evaluate and sample when they are due. Every rank takes part. Who asks for a stop waits for no validation."""
        config, progress = self.config, self.progress
        last = progress.step == self.total_steps
        evaluate = self.data.val is not None and not stopped and (last or due(progress.step, config.eval_interval))
        if last or stopped or evaluate or due(progress.step, config.log_interval):
            record = self.record(rate, norm)
            if evaluate:
                record |= self.evaluate()
            self.metrics.log(record)
            self.warn(record)
            self.window.start()
        else:
            self.metrics.advance(progress.step)
        if due(progress.step, config.sample_interval) and not stopped:
            self.sample()

    def record(self, rate: float, norm: float) -> dict[str, Any]:
        """One line of metrics.jsonl. `loss` and its companions are those of this update, speed is since the last line."""
        progress, window = self.progress, self.window
        seconds = window.seconds()
        progress.seconds += seconds
        speed = window.real_tokens / max(seconds, 1e-9)
        record: dict[str, Any] = {"step": progress.step, "epoch": progress.position / len(self.data.train)}
        record |= {
            name: value for name, value in self.objective.metrics(window.sums, window.weight).items() if name != "bpb"
        }
        record |= {"lr": rate, "grad_norm": norm, "tokens": progress.tokens, "tokens_per_second": speed}
        record |= {"mfu": speed * self.flops_per_token / self.peak_flops, "seconds": progress.seconds}
        record["memory_mb"] = peak_memory_mb(self.engine.device)
        if self.config.stage == "dpo":
            record["pairs_per_second"] = window.total_weight / max(seconds, 1e-9)
        return record

    def evaluate(self) -> dict[str, float]:
        """val_* of the held-out rows. All ranks run the same number of batches, of padding where there are no more rows."""
        assert self.data.val is not None
        sums, weight = evaluate_rows(self.engine, self.objective, self.data.val, self.config)
        return {f"val_{name}": value for name, value in self.objective.metrics(sums, weight).items()}

    def warn(self, record: dict[str, Any]) -> None:
        """Say when preference training does nothing or too much."""
        if self.config.stage != "dpo" or self.progress.step < 20:
            return
        margin, accuracy = record["reward_margin"], record["reward_accuracy"]
        if abs(margin) < 1e-3 and record["lr"] > 0:
            self.say(
                f"warning: reward_margin is {margin:.1e} at step {record['step']}: nothing moves; raise --learning_rate"
            )
        elif accuracy == 1.0 and record["loss"] < 0.01:
            self.say(
                f"warning: loss {record['loss']:.4f} with every pair right at step {record['step']}: saturated; lower --learning_rate or --epochs, or raise --beta"
            )
        if record["drift"] < -50:
            self.say(
                f"warning: the chosen answers lost {-record['drift']:.0f} nats each since the start; lower --learning_rate or raise --beta"
            )

    def sample(self) -> None:
        """A short answer of the model as it stands."""
        chat = self.config.stage != "pretrain"
        prompt = self.config.sample_prompt or ("Who are you?" if chat else "Once upon a time")
        if chat:
            ids = render_chat(self.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).ids
        else:
            ids = start_document(self.tokenizer, self.tokenizer.encode(prompt))
        model = self.engine.whole_model()
        if model is None or not self.first:
            return
        answer = generate(
            model.eval(),
            [ids],
            max_new_tokens=64,
            temperature=0.7,
            top_p=0.9,
            seed=self.progress.step,
            stop_ids=self.tokenizer.stop_ids,
        )[0]
        self.metrics.sample(self.progress.step, prompt, self.tokenizer.decode(answer.ids))

    def check_finite(self, norm: float, sums: dict[str, float], micro_batches: list[Batch]) -> None:
        """Name the rank and rows of a non-finite update (it was skipped); stop, state saved, after a few in a row."""
        if math.isfinite(norm) and math.isfinite(sums["loss"]):
            self.bad_updates = 0
            return
        self.bad_updates += 1
        scales = self.engine.scales_loss
        culprits = [
            batch.row_ids for batch, loss in zip(micro_batches, self.engine.losses, strict=True) if not loss.isfinite()
        ]
        named = [f"rank {rank}, packed rows {rows}" for rank, rows in enumerate(self.engine.gather(culprits)) if rows]
        where = "; ".join(named) or "the losses are finite, the gradient is not"
        if not (scales and not named):
            self.say(
                f"step {self.progress.step}: loss {sums['loss']:.4g}, gradient norm {norm:.4g}: update skipped ({where})"
            )
        if self.bad_updates >= (BAD_UPDATES_FLOAT16 if scales else BAD_UPDATES):
            self.save()
            raise ValueError(
                f"{self.bad_updates} updates in a row were not finite, the last at step {self.progress.step} ({where}); the state is saved. "
                "Lower --learning_rate, look at these rows, or use --dtype float32"
            )

    # --- state ---

    def comparable(self) -> dict[str, Any]:
        """What is worth a note where it differs at a resume."""
        names = (
            "epochs", "max_steps", "batch_size", "accumulation_steps", "global_batch_size", "learning_rate", "min_lr", "warmup_steps",
            "lr_schedule", "weight_decay", "grad_clip", "dtype", "dropout",
        )  # fmt: skip
        spread = {"engine": self.engine.name, "processes": self.engine.world.size}
        return (
            {name: getattr(self.config, name) for name in names}
            | spread
            | {"rows an update": self.loader.rows_per_update}
        )

    def resume(self) -> Progress:
        """Load the checkpoint config.resume asks for, after checking that it continues this very run."""
        folder = self.config.run_dir / "checkpoints"
        if self.first:
            for half_written in folder.glob(".step_*.part"):
                shutil.rmtree(half_written)
        found = checkpoint.find(self.config.resume, folder, self.say) if self.first else None
        found = self.engine.gather(found)[0]
        if found is None:
            if self.first and (old := checkpoint.by_step(folder)):
                self.say(f"starting over: the {len(old)} checkpoints in {folder} are removed")
                for path in old:
                    shutil.rmtree(path)
            return Progress()
        saved = checkpoint.read_run(found)
        for name, value in self.identity.items():
            if saved["identity"].get(name) != value:
                raise ValueError(
                    f"{found} was made with {name} {saved['identity'].get(name)!r}, this run has {value!r}, so it cannot continue it exactly; "
                    f"use the old {name}, another --out_dir, or start over with --resume none"
                )
        checkpoint.load(self.engine, found)
        changed = {k: (saved["config"].get(k), v) for k, v in self.comparable().items() if saved["config"].get(k) != v}
        for name, (before, now) in changed.items():
            self.say(f"note: {name} was {before!r} when this checkpoint was saved and is {now!r} now")
        self.say(f"resumed from {found}")
        return Progress(**saved["progress"])

    def save(self, last: bool = True) -> None:
        """Checkpoint and model folder. A checkpoint that cannot be written is told loudly; at the end it is an error.

        With config.async_save only the last one is waited for.
        """
        if self.saving is not None:
            self.finish_save()
        if self.saved_step == self.progress.step:
            return
        run = {
            "progress": asdict(self.progress),
            "identity": self.identity,
            "config": self.comparable(),
        }
        folder = self.config.run_dir / "checkpoints" / f"step_{self.progress.step:06d}"
        background = self.config.async_save and not last
        self.saving = checkpoint.Saving(
            self.engine, folder, run, self.config.keep_last, background, also=self.export(background)
        )
        if not background:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the checkpoint under way, if there is one."""
        while self.saving is not None:
            self.advance_save()

    def advance_save(self) -> None:
        """Take the checkpoint under way a step further, and say if it failed."""
        assert self.saving is not None
        if not self.saving.published():
            return
        saving, self.saving = self.saving, None
        step = checkpoint.step_of(saving.folder)
        if saving.problem is None:
            self.saved_step = step
            return
        message = f"step {step} could not be saved in {self.config.run_dir}: {saving.problem}; earlier checkpoints are untouched. Free some space"
        if step >= self.total_steps:
            raise ValueError(f"{message} and run the same command again")
        self.say(f"warning: {message}; training goes on and saves again in {self.config.save_interval} steps")

    def export(self, background: bool) -> Callable[[], None] | None:
        """What writes the Hugging Face model folder: on rank 0, of the weights as they are now."""
        weights = self.engine.weights()
        if not self.first:
            return None
        if background:
            weights = {name: tensor.clone() for name, tensor in weights.items()}
        return partial(export_model, self.engine.model, weights, self.tokenizer, self.config.run_dir)


def export_model(model: GPT, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
    tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    save_pretrained(model, folder, weights=weights, **tokens)
    tokenizer.save(folder)


def evaluate_rows(
    engine: SingleEngine, objective: Objective, rows: Rows, config: Config
) -> tuple[dict[str, float], float]:
    """Sums and weight over (at most config.eval_rows of) these rows, the same choice at every call."""
    limit = min(len(rows), config.eval_rows or len(rows))
    loader = Loader(rows, config.batch_size, rank=engine.world.rank, world_size=engine.world.size, total_rows=limit)
    totals = dict.fromkeys(objective.names, 0.0)
    weight = 0.0
    for position in range(0, limit, loader.rows_per_update):
        sums, w = engine.evaluate(loader.update(position), objective)
        totals = {name: totals[name] + sums[name] for name in totals}
        weight += w
    return totals, weight


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class Window:
    """What has been summed since the last logged line."""

    def start(self) -> None:
        self.began = time.perf_counter()
        self.real_tokens = self.total_weight = 0.0
        self.sums: dict[str, float] = {}
        self.weight = 0.0

    def add(self, sums: dict[str, float], weight: float, real_tokens: float) -> None:
        self.sums, self.weight = sums, weight
        self.real_tokens += real_tokens
        self.total_weight += weight

    def seconds(self) -> float:
        return time.perf_counter() - self.began


class StopSignals:
    """SIGTERM and Ctrl-C ask for a stop after the running update; only a second Ctrl-C stops at once."""

    requested = False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
