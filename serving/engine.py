"""Answers of many clients at once: jobs in, deltas out, one thread that computes.

    engine = Engine([served], slots=16, context=512, max_waiting=64, metrics=Metrics())
    engine.start(deliver)          deliver([(job, Progress(deltas=[Piece("content", "Hi")])), ...]) after every round
    engine.submit("full_sft_512", [job])
    engine.cancel(job)             its client went away: the slot is free from the next round on
    engine.stop(seconds=30)        what runs is finished, within the time

A round: who was cancelled or is late leaves, who waits gets a free slot and has its prompt read and its first token
drawn, and every other sequence gets its next token (model/slots.py). So a first token comes within two rounds of a free
slot. Models take turns: each would only take the others' cores.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dataset import TextTokenizer
from model import GPT
from model.generate import penalise_repetition, sample, seen_tokens
from model.slots import Slots
from serving.errors import ApiError
from serving.metrics import Metrics
from serving.reader import Call, Delta, TextReader


class SamplingParams(NamedTuple):
    """How tokens are chosen; `model.stream` says what each means."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(eq=False)
class Served:
    """A model and what it is called."""

    name: str
    model: GPT
    tokenizer: TextTokenizer
    chat: bool  # whether it was trained to; else it continues texts
    created: int = field(default_factory=lambda: int(time.time()))


class TokenLogprob(NamedTuple):
    """A token that was drawn, the log-probability that the network gave it (nats, before temperature and top_p), and
    the likeliest tokens with theirs."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Job:
    """One answer to one prompt."""

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    uniforms: list[float]  # in [0, 1), what each token is drawn by
    reader: TextReader
    deadline: float  # time.monotonic()
    top_logprobs: int | None = None  # alternatives to tell beside each token; None: tell no log-probabilities
    arrived: float = field(default_factory=time.monotonic)
    generated: int = 0
    cached: int = 0  # tokens of the prompt that did not have to be computed
    called: bool = False  # whether there was a tool call
    cancelled: bool = False
    seen: Tensor | None = None  # bool (vocabulary,), where repetition is penalised


class Progress(NamedTuple):
    """What a round brought for a job."""

    deltas: Sequence[Delta] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None  # "stop", "length" or "tool_calls" where the answer is over
    error: ApiError | None = None  # or what ended it


Delivery = list[tuple[Job, Progress]]


class Batch:
    """One model's sequences. Only the engine's thread comes here, but for `waiting`, which the engine's lock guards."""

    def __init__(self, served: Served, slots: int, context: int, metrics: Metrics) -> None:
        self.served, self.metrics, self.context = served, metrics, context
        self.slots = Slots(served.model, slots, context)
        self.jobs: list[Job] = []  # of every row in use
        self.waiting: deque[Job] = deque()
        self.next: list[int] = []  # the token that each row takes in next

    def step(self) -> Delivery:
        """The next token of every sequence."""
        began = time.perf_counter()
        tokens, logprobs = self.choose(self.slots.step(self.next), self.jobs)
        self.metrics.step.labels(self.served.name).observe(time.perf_counter() - began)
        self.next = tokens
        return self.take(list(zip(self.jobs, tokens, logprobs, strict=True)))

    def join(self, job: Job) -> Delivery:
        """Give a job a slot, and draw its first token."""
        name, counted = self.served.name, self.metrics.tokens
        self.jobs.append(job)  # first of all: where something fails, it is told with the others
        logits, job.cached = self.slots.join(job.prompt)
        counted.labels(name, "prompt").inc(len(job.prompt))
        counted.labels(name, "cached").inc(job.cached)
        if job.sampling.repetition_penalty != 1:
            job.seen = seen_tokens([job.prompt], self.served.model.config.vocab_size)[0].to(logits.device)
        tokens, logprobs = self.choose(logits[None], [job])
        self.next += tokens
        self.metrics.first_token.labels(name).observe(time.monotonic() - job.arrived)
        return self.take([(job, tokens[0], logprobs[0])])

    def leave(self, job: Job) -> None:
        row = self.jobs.index(job)
        self.slots.leave(row)
        last, token = self.jobs.pop(), self.next.pop()
        if job is not last:
            self.jobs[row], self.next[row] = last, token

    @torch.inference_mode()
    def choose(self, logits: Tensor, jobs: Sequence[Job]) -> tuple[list[int], list[TokenLogprob | None]]:
        """A token a row, (rows, vocabulary) of the network: those that are drawn alike are drawn together."""
        logits = logits.float()
        tokens, alike = [0] * len(jobs), dict[SamplingParams, list[int]]()
        for row, job in enumerate(jobs):
            alike.setdefault(job.sampling, []).append(row)
        for sampling, rows in alike.items():
            scores = logits if len(rows) == len(jobs) else logits[rows]
            if sampling.repetition_penalty != 1:
                seen = torch.stack([seen for row in rows if (seen := jobs[row].seen) is not None])
                scores = penalise_repetition(scores, seen, sampling.repetition_penalty)
            uniforms = torch.tensor([[jobs[row].uniforms[jobs[row].generated]] for row in rows], device=logits.device)
            scores = scores[:, : self.served.tokenizer.vocab_size]
            drawn = sample(scores, sampling.temperature, sampling.top_k, sampling.top_p, uniforms)
            for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
                tokens[row] = token
        return tokens, [self.logprob(logits[row], token, jobs[row]) for row, token in enumerate(tokens)]

    def logprob(self, logits: Tensor, token: int, job: Job) -> TokenLogprob | None:
        if job.top_logprobs is None:
            return None
        logps = logits[: self.served.tokenizer.vocab_size].log_softmax(-1)
        top = logps.topk(job.top_logprobs)
        return TokenLogprob(
            token, float(logps[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )

    def take(self, drawn: Sequence[tuple[Job, int, TokenLogprob | None]]) -> Delivery:
        """What tokens mean to their jobs; whose answer is over leaves."""
        self.metrics.tokens.labels(self.served.name, "generated").inc(len(drawn))
        delivery = []
        for job, token, logprob in drawn:
            progress = self.read(job, token, logprob)
            delivery.append((job, progress))
            if progress.finish_reason:
                self.leave(job)
        return delivery

    def read(self, job: Job, token: int, logprob: TokenLogprob | None) -> Progress:
        job.generated += 1
        if job.seen is not None:
            job.seen[token] = True
        ended = token in self.served.tokenizer.stop_ids
        deltas = [] if ended else job.reader.push(token)
        full = job.generated >= job.max_new_tokens
        if over := ended or job.reader.stopped or full:
            deltas += job.reader.finish()
        job.called = job.called or any(isinstance(delta, Call) for delta in deltas)
        reason = None
        if over:
            stopped = ended or job.reader.stopped
            reason = "length" if not stopped else "tool_calls" if job.called else "stop"
        return Progress(deltas, [logprob] if logprob and not ended else [], reason)

    def clear(self) -> None:
        """Forget all sequences, also what was left in the cache."""
        self.slots = Slots(self.served.model, len(self.slots.held), self.context)
        self.jobs, self.next = [], []


class Engine:
    """All models' batches, and the thread that computes. Every public method may be called from any thread."""

    def __init__(
        self, models: Sequence[Served], slots: int, context: int | None, max_waiting: int, metrics: Metrics
    ) -> None:
        """context: most tokens of a sequence; None: as many as each model was made for."""
        self.batches: dict[str, Batch] = {}
        for served in models:
            most = served.model.config.max_seq_len
            self.batches[served.name] = Batch(served, slots, min(context or most, most), metrics)
        self.slots, self.max_waiting, self.metrics = slots, max_waiting, metrics
        self.changed = threading.Condition()
        self.stopping = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @property
    def cache_bytes(self) -> int:
        return sum(batch.slots.cache_bytes for batch in self.batches.values())

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def start(self, deliver: Callable[[Delivery], None]) -> None:
        """deliver: called from the engine's thread after every round that brought something."""
        self.deliver = deliver
        self.thread.start()

    def submit(self, name: str, jobs: Sequence[Job]) -> None:
        """Let jobs wait for slots. Raises ApiError (429) where more would wait than may, and 503 after `stop`."""
        batch = self.batches[name]
        with self.changed:
            if self.stopping:
                raise ApiError(503, "the server is stopping; ask another one, or again later", code="stopping")
            room = self.max_waiting + self.slots - len(batch.jobs) - len(batch.waiting)
            if len(jobs) > room:
                raise ApiError(
                    429,
                    f"{len(batch.waiting)} answers wait already, and {self.max_waiting} may; ask again in a moment",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            batch.waiting.extend(jobs)
            self.metrics.waiting.labels(name).set(len(batch.waiting))
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more. It may be over already."""
        with self.changed:
            job.cancelled = True
            self.changed.notify()

    def stop(self, seconds: float) -> bool:
        """Take nothing new, and finish what there is; whether that was done within the time."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(seconds)
        return not self.thread.is_alive()

    def run(self) -> None:
        while True:
            with self.changed:
                while not any(batch.jobs or batch.waiting for batch in self.batches.values()):
                    if self.stopping:
                        return
                    self.changed.wait()
            for batch in self.batches.values():
                if delivery := self.round(batch):
                    self.deliver(delivery)

    def round(self, batch: Batch) -> Delivery:
        """One token more for every sequence, and for those that join. An error ends them all, and no more."""
        delivery: Delivery = []
        try:
            delivery += self.dismiss(batch)
            if batch.jobs:
                delivery += batch.step()
            while batch.slots.free and (job := self.next_waiting(batch)):
                delivery += batch.join(job)
        except Exception as error:
            traceback.print_exc()
            failed = ApiError(500, f"the answer could not be computed: {type(error).__name__}: {error}")
            delivery += [(job, Progress(error=failed)) for job in batch.jobs]
            batch.clear()
        name = batch.served.name
        self.metrics.active.labels(name).set(len(batch.jobs))
        self.metrics.waiting.labels(name).set(len(batch.waiting))
        return delivery

    def next_waiting(self, batch: Batch) -> Job | None:
        with self.changed:
            return batch.waiting.popleft() if batch.waiting else None

    def dismiss(self, batch: Batch) -> Delivery:
        """Let those go who were cancelled, or have had their time."""
        now, gone = time.monotonic(), list[Job]()
        for job in [job for job in batch.jobs if job.cancelled or job.deadline < now]:
            batch.leave(job)
            gone.append(job)
        with self.changed:
            late = [job for job in batch.waiting if job.cancelled or job.deadline < now]
            for job in late:
                batch.waiting.remove(job)
        error = ApiError(503, "the answer took longer than the server allows", code="timeout")
        return [(job, Progress(error=error)) for job in [*gone, *late] if not job.cancelled]
