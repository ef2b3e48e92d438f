"""The one training loop, for every stage, every source of rows and every way of spreading.

    position 0 --update--> position 64 --update--> ...      a position counts rows over all ranks and epochs

An update is: this rank's micro-batches, the gradient of the global mean loss, one optimizer step. Everything that must
survive a kill is in `Progress`, the engine's state and the random state.

The host runs ahead of the device. While an update is learnt the next is put together and counted (`Upcoming`), and the
numbers of one are looked at when the next is queued (`Pending`): nothing within an update waits for the device. Where a
line, a validation, a sample or a checkpoint is due, its numbers are waited for first.
"""

import contextlib
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

import torch

from dataset.batch import Batch
from dataset.forms import asked_alone
from model import GPT, generate
from training import checkpoint, distributed
from training.answers import Answers
from training.benchmarks import Benchmarks
from training.best import Best, check_keep_best
from training.config import save_config
from training.engines.contract import Engine, Totals
from training.metrics import Metrics, Record, held_out_name, peak_flops, peak_memory_mb
from training.objectives import Measured, Objective
from training.optimizer import learning_rate, peak_rate
from training.run_folder import held
from training.saver import Progress, Saver, Settings, noted, resume
from training.setup import Start
from training.transfer import Deferred, Sent, Transfer

BAD_UPDATES = 3  # non-finite updates in a row that stop the run
BAD_UPDATES_FLOAT16 = 25  # the loss scaler halves its scale at each, which is how it finds the right one


class Source(Protocol):
    """What is learnt from, an update at a time: packed rows (dataset.Loader), or whatever gives batches by position."""

    rows_per_update: int  # over all ranks
    total_rows: int  # the position at which training ends, where max_steps does not end it
    ahead: bool  # whether an update may be asked for while the one before is learnt
    passes: int  # how often an update is learnt from

    @property
    def rows_per_epoch(self) -> int: ...

    @property
    def tokens_per_row(self) -> float:
        """Real (non-padding) tokens of a row, on average; 0 where nobody knows yet."""

    @property
    def beside(self) -> "Source | None":
        """The same updates of rows that are asked about before these are learnt (mismatched answers); None for none."""

    def prompts(self, limit: int) -> list[list[int]]:
        """Open prompts, of held-out rows that have them."""

    def samples(self) -> tuple[str, str] | None:
        """What the update asked for last was made of, where people may want to read that: a prompt, and answers."""

    def update(self, position: int) -> Sequence[Batch]:
        """This rank's micro-batches of the update that begins at a position."""


def train(
    engine: Engine,
    objective: Objective[Any],
    source: Source,
    held_out: Source | None,
    start: Start[Any],
    identity: Settings,
) -> None:
    """Train from the newest checkpoint (config.resume) to the end; leaves a model folder in config.run_dir.

    `identity` holds what must be equal for a resumed run to continue this one exactly (data, seed, shape, start).
    Raises ValueError for a checkpoint of another identity, and after several non-finite updates in a row.
    """
    config, first = start.config, engine.world.rank == 0
    say = partial(print, flush=True)
    check_keep_best(config, objective, held_out is not None)
    checkpoint.share_folder(engine, config.run_dir)
    # one that was started again by itself may find the process before it still dying on another node
    patience = config.comm_timeout if distributed.restarted() else 0
    with held(engine, config.run_dir, patience, say):
        torch.manual_seed(config.seed + engine.world.random_rank)  # nothing random before this counts
        settings = noted(config, engine, source.rows_per_update)
        progress = resume(engine, config, identity, settings, say)
        total_steps = planned_steps(source, progress, config.max_steps)
        metrics = Metrics(
            config.run_dir, asdict(config), stage=config.stage, total_steps=total_steps, start_step=progress.step,
            enabled=first, use_wandb=config.use_wandb, wandb_project=config.wandb_project,
            wandb_run_name=config.wandb_run_name or config.run_dir.name, use_tensorboard=config.use_tensorboard,
        )  # fmt: skip
        saver = Saver(engine, config, start.tokenizer, identity, settings, progress, total_steps, metrics.print)
        run = Run(engine, objective, source, held_out, start, progress, total_steps, metrics, saver)
        with explained(run), metrics:
            run.loop()


@contextlib.contextmanager
def explained(run: "Run") -> Iterator[None]:
    """Memory that ran out and ranks that are gone, as a ValueError that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        config, step = run.config, run.progress.step
        if (words := distributed.lost_contact(error)) is not None:
            raise ValueError(
                f"rank {run.engine.world.rank} lost contact with another rank after step {step} "
                f"({words}); the newest checkpoint stands, and the same command goes on from it "
                "(torchrun --max_restarts N does so by itself)"
            ) from error
        if not any(
            isinstance(each, torch.OutOfMemoryError) or re.search("(out of|enough|allocate) memory", str(each))
            for each in distributed.causes(error)
        ):
            raise
        raise ValueError(
            f"out of memory on {run.engine.device} at step {step}: lower --batch_size (now {config.batch_size}; raise "
            "--accumulation_steps by the same factor to keep the update the same), then --max_seq_len "
            f"(now {config.max_seq_len}), or give --grad_checkpointing"
        ) from error


@dataclass
class Run:
    """The loop, and what it says on its way. Built by `train`."""

    engine: Engine
    objective: Objective[Any]
    source: Source
    held_out: Source | None
    start: Start[Any]
    progress: Progress
    total_steps: int
    metrics: Metrics
    saver: Saver

    def __post_init__(self) -> None:
        self.config, self.tokenizer, self.say = self.start.config, self.start.tokenizer, self.metrics.print
        model = self.engine.model
        with torch.device("meta"):  # a rank may hold a part of the parameters, or none
            self.whole = GPT(model.config, model.adapter)
        self.flops_per_token = self.whole.flops_per_token(self.start.max_seq_len)
        # a CPU has no peak to speak of: the rate of a product depends on its size, its threads, and who else is there
        gpu = self.engine.device.type != "cpu"
        self.peak_flops = peak_flops(self.engine.device, self.engine.dtype) * self.engine.world.size if gpu else None
        self.best = Best(self.engine, self.config, self.tokenizer, self.progress, self.say)
        prompts = self.held_out.prompts(self.config.eval_answers) if self.held_out else []
        self.answers = Answers(self.engine, self.tokenizer, prompts, self.progress, self.say)
        self.benchmarks = Benchmarks(self.engine, self.config, self.tokenizer, self.say)
        self.bad_updates = 0
        self.pending: Pending | None = None
        self.transfer = Transfer(self.engine.device)
        self.window = Window()
        self.progress.schedule_rows = self.progress.schedule_rows or self.source.rows_per_update

    def loop(self) -> None:
        config, progress, engine, saver = self.config, self.progress, self.engine, self.saver
        self.begin()
        with StopSignals() as stop, self.upcoming(stop) as upcoming:
            self.window.start()
            while progress.step < self.total_steps and not self.best.over:
                update = upcoming.take(progress.position)
                rate = self.rate()
                objective = informed(engine, self.objective, self.source, [progress.position])
                passes = [
                    (engine.forward_backward(update.sent.arrived(), objective, update.weight), engine.step(rate))
                    for _ in range(self.source.passes)
                ]
                progress.step += 1
                progress.position = min(progress.position + self.source.rows_per_update, self.source.total_rows)
                progress.tokens += int(update.supervised)
                self.window.add(update)
                rows = [batch.row_ids for batch in update.sent.micro_batches]
                for totals, norm in passes:
                    self.follow(Pending(progress.step, rate, norm, totals, rows))
                news = upcoming.news()
                self.report(news.stop)
                if news.stop:
                    break
                if news.written:
                    saver.advance()
                if due(progress.step, config.save_interval) and progress.step < self.total_steps:
                    self.settle()
                    saver.save(progress, last=False)
            saver.save(progress)  # in here: a second signal while it writes must not cost it
        self.end()

    def begin(self) -> None:
        complete = self.progress.step >= self.total_steps
        if complete:
            self.say(
                f"this run is complete at step {self.progress.step}; raise --epochs or --max_steps to go on, "
                "or start over with --resume none"
            )
        elif not self.best.over:
            self.say(self.introduction())
            self.answers.begin()
        record = self.config.run_dir / "config.yaml"
        if self.engine.world.rank == 0 and not (complete and record.is_file()):  # it says what was trained with
            save_config(self.config, record)
        distributed.set_timeout(timedelta(seconds=self.config.comm_timeout))

    def rate(self) -> float:
        """The learning rate of the next update. With max_steps it belongs to the step, else to the place in the data,
        so that it does not jump where another number of ranks makes updates larger or smaller."""
        config, progress, rows = self.config, self.progress, self.progress.schedule_rows
        if config.max_steps:
            return learning_rate(progress.step, self.total_steps, config)
        return learning_rate(progress.position / rows, math.ceil(self.source.total_rows / rows), config)

    def introduction(self) -> str:
        """What is trained, on what, for how long, from where and to where: one line."""
        config, engine, world, source = self.config, self.engine, self.engine.world, self.source
        parameters = f"{self.whole.num_parameters() / 1e6:,.3f} M parameters"
        if self.whole.adapter is not None:
            parameters += f", {self.whole.num_parameters(learnt=True) / 1e6:,.3f} M of them learnt ({config.adapter})"
        ranks = f"{world.size} rank" + ("s" if world.size > 1 else "")
        split = [f"{flag} {size}" for flag, size in (("tp", world.tp), ("pp", world.pp)) if size > 1]
        ranks += f" ({', '.join(split)})" if split else ""
        precision = str(engine.dtype).removeprefix("torch.")
        tokens = source.rows_per_update * source.tokens_per_row
        about = f" (about {tokens:,.0f} tokens)" if tokens else ""
        start = f"random weights, seed {config.seed}" if config.init_from in (None, "none") else config.init_from
        return (
            f"{config.stage}: {parameters}, context {self.start.max_seq_len}, "
            f"on {engine.device} in {precision}, {engine.name} on {ranks}; "
            f"steps {self.progress.step + 1:,} to {self.total_steps:,} of {source.rows_per_update:,} rows{about} "
            f"by {config.optimizer} at {peak_rate(config):.2g}; from {start}; into {config.run_dir}"
        )

    def end(self) -> None:
        """Say how the run ended, and what it leaves."""
        config, step, total_steps = self.config, self.progress.step, self.total_steps
        if step < total_steps and self.best.over:
            self.say(
                f"ended at step {step} of {total_steps} by --patience {config.patience}: none since was better than "
                f"{self.best}; a larger --patience goes on"
            )
        elif step < total_steps:
            self.say(f"stopped at step {step} of {total_steps}; the same command continues from here")
            return
        self.say(f"model folder: {config.run_dir}")
        if self.best.kept:
            self.say(f"best model: {self.best.folder} ({self.best})")

    def upcoming(self, stop: "StopSignals") -> "Upcoming":
        return Upcoming(
            self.source,
            self.total_steps - self.progress.step,
            self.count,
            lambda: News(stop.requested, self.saver.written()),
            alone=self.engine.world.size == 1,
        )

    def count(self, micro_batches: Sequence[Batch], news: "News") -> "Update":
        """An update on its way to the device, what it is made of, and what any rank was asked; one sum tells all ranks
        the same."""
        world = self.engine.world
        counts = [
            float(news.stop),
            float(news.written),
            float(sum(self.objective.weight(batch) for batch in micro_batches)),
            float(sum(batch.real_tokens for batch in micro_batches)),
            float(sum(batch.supervised for batch in micro_batches)),
        ]
        stop, written, *rows = self.engine.sum_on_host(counts)
        # ranks that hold one model between them have seen the same rows
        weight, real, supervised = (count / world.model_size for count in rows)
        return Update(
            self.transfer.send(list(micro_batches)), weight, real, supervised, News(stop > 0, written == world.size)
        )

    # --- numbers that come later ---

    def follow(self, update: "Pending") -> None:
        """Look at the update before, now that the device has this one to go on with."""
        before, self.pending = self.pending, update
        if before is not None:
            self.check_finite(before)

    def settle(self) -> None:
        """Wait for the update that is under way, and look at it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.check_finite(pending)

    def check_finite(self, update: "Pending") -> None:
        """Name the rank and rows of a non-finite update (it was skipped); stop, state saved, after a few in a row."""
        norm, totals = update.norm.read(), update.totals.read()
        loss = totals.sums["loss"]
        if math.isfinite(norm) and math.isfinite(loss):
            self.bad_updates = 0
            return
        self.bad_updates += 1
        scales = self.engine.scales_loss
        culprits = [rows for rows, loss in zip(update.rows, totals.losses, strict=True) if not math.isfinite(loss)]
        culprits = culprits if self.engine.world.tells else []
        named = [f"rank {rank}, packed rows {rows}" for rank, rows in enumerate(self.engine.gather(culprits)) if rows]
        where = "; ".join(named) or "the losses are finite, the gradient is not"
        if named or not scales:
            self.say(f"step {update.step}: loss {loss:.4g}, gradient norm {norm:.4g}: update skipped ({where})")
        if self.bad_updates >= (BAD_UPDATES_FLOAT16 if scales else BAD_UPDATES):
            self.saver.save(self.progress)
            raise ValueError(
                f"{self.bad_updates} updates in a row were not finite, the last at step {update.step} ({where}); "
                "the state is saved. Lower --learning_rate, look at these rows, or use --dtype float32"
            )

    # --- what is said ---

    def report(self, stopped: bool) -> None:
        """Log, evaluate and sample when due. Every rank takes part. Who asks for a stop waits for no validation."""
        config, progress = self.config, self.progress
        last = progress.step == self.total_steps
        evaluate = not stopped and (last or due(progress.step, config.eval_interval))
        benchmark = self.benchmarks.items and not stopped and (last or due(progress.step, config.benchmark_interval))
        logged = last or stopped or benchmark or due(progress.step, config.log_interval)
        if logged or (evaluate and self.held_out):
            learnt = self.pending
            assert learnt is not None
            self.settle()
            record = self.record(learnt)
            if evaluate and self.held_out:
                record |= held_out_metrics(self.engine, self.objective, self.held_out) | self.answers.look()
            if benchmark:
                record |= self.benchmarks.look(progress.step)
            self.metrics.log(record)
            for warning in self.objective.warnings(record):
                self.say(f"warning: {warning}")
            self.answers.warn(record)
            if evaluate and self.held_out:
                self.best.see(record)
            self.window.start()
        else:
            self.metrics.advance(progress.step)
        if due(progress.step, config.sample_interval) and not stopped:
            self.sample()

    def record(self, update: "Pending") -> Record:
        """One line of metrics.jsonl. `loss` and its companions are those of this update, speed is since the last
        line."""
        progress, window, unit = self.progress, self.window, self.objective.unit
        seconds = window.seconds()
        progress.seconds += seconds
        speed = window.real_tokens / max(seconds, 1e-9)
        totals = update.totals.read()
        learnt = self.objective.metrics(totals.sums, totals.weight)
        record: Record = {"step": progress.step, "epoch": progress.position / self.source.rows_per_epoch}
        record |= {name: value for name, value in learnt.items() if name not in self.objective.only_held_out}
        record |= {"lr": update.rate, "grad_norm": update.norm.read()}
        record |= {"tokens": progress.tokens, "tokens_per_second": speed}
        if self.peak_flops is not None:
            record["mfu"] = speed * self.flops_per_token / self.peak_flops
        record |= {"seconds": progress.seconds, "memory_mb": peak_memory_mb(self.engine.device)}
        if unit:
            record[f"{unit}_per_second"] = window.weight / max(seconds, 1e-9)
        return record

    def sample(self) -> None:
        """What was learnt from last, or a short answer of the model as it stands."""
        shown = self.source.samples()
        if shown is not None:
            self.metrics.sample(self.progress.step, *shown)
            return
        prompt = self.config.sample_prompt or ("Who are you?" if self.config.chats else "Once upon a time")
        ids = asked_alone(self.tokenizer, prompt, self.config.chats)
        with self.engine.generator() as model:
            if self.engine.world.rank != 0:
                return
            (answer,) = generate(
                model,
                [ids],
                max_new_tokens=64,
                temperature=0.7,
                top_p=0.9,
                seed=self.progress.step,
                stop_ids=self.tokenizer.stop_ids,
                vocab_size=self.tokenizer.vocab_size,
            )
        self.metrics.sample(self.progress.step, prompt, self.tokenizer.decode(answer.ids))


def planned_steps(source: Source, progress: Progress, max_steps: int) -> int:
    """Steps at the end of the run. Counted from where the run stands, so that another number of ranks changes the size
    of what is left to do, and a run left alone has the same plan at every resume."""
    if max_steps:
        return max(progress.step, max_steps)
    left = max(0, source.total_rows - progress.position)
    return progress.step + math.ceil(left / source.rows_per_update)


def held_out_metrics(engine: Engine, objective: Objective[Any], source: Source) -> dict[str, float]:
    """val_* of the held-out rows, the same choice at every call. All ranks run the same number of batches, of padding
    where there are no more rows."""
    positions = range(0, source.total_rows, source.rows_per_update)
    objective = informed(engine, objective, source, positions)
    sums, weight = measured(engine, objective, source, positions)
    return {held_out_name(name): value for name, value in objective.metrics(sums, weight).items()}


def informed(engine: Engine, objective: Objective[Any], source: Source, positions: Sequence[int]) -> Objective[Any]:
    """The objective, told what it has to know of these updates before the first is looked at. What it asks for is
    waited for; most ask for nothing."""
    beside = source.beside
    return objective if beside is None else objective.informed(lambda: measured(engine, objective, beside, positions))


def measured(engine: Engine, objective: Objective[Any], source: Source, positions: Sequence[int]) -> Measured:
    """The objective's sums over these updates and all ranks, and their weight, without gradients."""
    sums, weight = dict.fromkeys(objective.names, 0.0), 0.0
    for position in positions:
        totals = engine.evaluate(list(source.update(position)), objective)
        sums = {name: sums[name] + totals.sums[name] for name in sums}
        weight += totals.weight
    return sums, weight


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


class News(NamedTuple):
    """Of a rank, or of all of them."""

    stop: bool  # a rank was asked to
    written: bool  # all ranks have done their part of a save under way


class Update(NamedTuple):
    """This rank's micro-batches, and the counts of all data ranks'."""

    sent: Sent[Batch]
    weight: float
    real_tokens: float
    supervised: float
    news: News  # of all ranks, from when it was begun to be put together


class Pending(NamedTuple):
    """An update that is queued; its numbers come when the device has come so far."""

    step: int
    rate: float
    norm: Deferred[float]
    totals: Deferred[Totals]
    rows: list[list[int]]  # packed rows of every micro-batch, to name those that are not finite


class Upcoming:
    """The next update is put together and counted while this one is learnt, where its source allows that.

    Counting is a sum over ranks, in the same order on each of them: always by the thread, and by the main thread only
    where no update is ahead of it. Along go the news, which all ranks thereby hear of at the same step: what a rank is
    asked in one update it tells when the next is taken, and all have heard when that is learnt.
    """

    def __init__(
        self,
        source: Source,
        updates: int,
        count: Callable[[Sequence[Batch], News], Update],
        own: Callable[[], News],
        alone: bool,
    ):
        """`updates` is how many will be taken; none beyond is asked for. own: this rank's news."""
        self.source, self.left, self.count, self.own, self.alone = source, updates, count, own, alone
        self.pool = ThreadPoolExecutor(1, "upcoming")
        self.next: Future[Update] | None = None

    def take(self, position: int) -> Update:
        """The update at a position; calls follow each other without a gap."""
        news = self.own()
        self.taken = self.make(position, news) if self.next is None else self.next.result()
        self.left -= 1
        self.next = None
        if self.source.ahead and self.left > 0:
            self.next = self.pool.submit(self.make, position + self.source.rows_per_update, news)
        return self.taken

    def make(self, position: int, news: News) -> Update:
        return self.count(self.source.update(position), news)

    def news(self) -> News:
        """What all ranks have heard since this was last asked; one process has it from itself."""
        if self.alone:
            return self.own()
        if self.next is not None:
            return self.next.result().news
        return News(False, False) if self.source.ahead else self.taken.news

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.shutdown()


class Window:
    """What has been summed since the last logged line."""

    def start(self) -> None:
        self.began = time.perf_counter()
        self.real_tokens = self.weight = 0.0

    def add(self, update: Update) -> None:
        self.real_tokens += update.real_tokens
        self.weight += update.weight

    def seconds(self) -> float:
        return time.perf_counter() - self.began


class StopSignals:
    """SIGTERM and Ctrl-C ask for a stop after the running update; only a second Ctrl-C stops at once."""

    requested = False

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
