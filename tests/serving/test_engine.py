"""Rounds of the engine, one by one: who gets what when."""

import time
from typing import Any

import pytest

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from model import GPT, GPTConfig
from serving.engine import Batch, Engine, Job, SamplingParams, Served
from serving.errors import ApiError
from serving.metrics import Metrics
from serving.reader import TextReader

TOKENIZER = load_tokenizer(DEFAULT_TOKENIZER)
GREEDY = SamplingParams(0.0)


@pytest.fixture
def engine() -> Engine:
    model = GPT(GPTConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=64)).eval()
    return Engine([Served("a", model, TOKENIZER, chat=False)], 2, None, 3, Metrics())


@pytest.fixture
def batch(engine) -> Batch:
    return engine.batches["a"]


def job(prompt: list[int], tokens: int = 5, sampling: SamplingParams = GREEDY, **more: Any) -> Job:
    draws = {"uniforms": [0.5] * tokens, "deadline": time.monotonic() + 60} | more
    return Job(prompt, tokens, sampling, reader=TextReader(TOKENIZER), **draws)


def rounds(engine: Engine, batch: Batch, number: int) -> list[set[Job]]:
    """Who got something in each."""
    return [{job for job, _ in engine.round(batch)} for _ in range(number)]


def test_a_first_token_comes_in_the_round_that_follows_also_beside_others(engine, batch):
    first, second, third = job([5, 9], 9), job([7] * 60, 3), job([8], 1)
    engine.submit("a", [first])
    assert rounds(engine, batch, 2) == [{first}, {first}]
    engine.submit("a", [second, third])
    assert rounds(engine, batch, 5) == [{first, second}] * 2 + [{first, second, third}, {first}, {first}]
    assert (first.generated, second.generated, third.generated) == (7, 3, 1)


def test_a_slot_is_free_in_the_round_after_its_client_went_away(engine, batch):
    jobs = [job([5 + number], 40) for number in range(4)]
    engine.submit("a", jobs)
    rounds(engine, batch, 2)
    engine.cancel(jobs[0])
    engine.cancel(jobs[2])
    assert rounds(engine, batch, 1) == [{jobs[1], jobs[3]}] and not batch.waiting
    assert jobs[0].generated == 2 and jobs[2].generated == 0


def test_no_more_wait_than_may_and_none_after_a_stop(engine):
    jobs = [job([5]) for _ in range(5)]
    engine.submit("a", jobs[:4])
    with pytest.raises(ApiError, match="4 answers wait") as refused:
        engine.submit("a", jobs[4:] * 2)
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    engine.submit("a", jobs[4:])
    assert engine.stop(0)
    with pytest.raises(ApiError, match="stopping"):
        engine.submit("a", jobs[:1])


def test_who_has_had_his_time_is_told_waiting_or_not(engine, batch):
    late = [job([5], deadline=time.monotonic() + 60) for _ in range(3)]
    engine.submit("a", late)
    rounds(engine, batch, 1)
    for each in late:
        each.deadline = 0
    errors = {each: progress.error for each, progress in engine.round(batch)}
    assert set(errors) == set(late) and {error.code for error in errors.values()} == {"timeout"}
    assert not batch.jobs and batch.slots.free == 2


def test_an_error_ends_the_answers_that_ran_and_not_the_server(engine, batch):
    broken, beside = job([5], uniforms=[0.5]), job([6])  # of which the second token cannot be drawn
    engine.submit("a", [beside, broken])
    rounds(engine, batch, 1)
    errors = [progress.error for _, progress in engine.round(batch)]
    assert [error.status for error in errors if error] == [500, 500]
    after = job([6], 2)
    engine.submit("a", [after])
    assert rounds(engine, batch, 2) == [{after}, {after}] and not batch.jobs


def test_everyone_is_drawn_for_as_he_asked(engine, batch):
    """Rows of other settings in the same step change nothing."""
    settings = [
        SamplingParams(0.0),
        SamplingParams(0.8, 0.5),
        SamplingParams(1.3, top_k=3),
        SamplingParams(0.0, repetition_penalty=5.0),
    ]

    def answers(together: int) -> list[list[int]]:
        found: dict[Job, list[int]] = {}
        waiting = [job([5, 9], 6, sampling, uniforms=[0.3, 0.9, 0.1, 0.7, 0.5, 0.2]) for sampling in settings]
        order = list(waiting)
        while waiting or batch.jobs:
            if waiting:
                engine.submit("a", [waiting.pop(0) for _ in range(together)])
            while batch.jobs or batch.waiting:
                engine.round(batch)
                for each, token in zip(batch.jobs, batch.next, strict=True):
                    found.setdefault(each, []).append(token)
        return [found[each] for each in order]

    alone = answers(1)
    assert alone == answers(2) and len({tuple(each) for each in alone}) == 4
    assert len(set(alone[3])) == len(alone[3])  # nothing twice
