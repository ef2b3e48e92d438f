"""The loop by name: what it asks a source for and when, where it ends, what it says, and what stops it."""

import json
import signal
import threading
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dataset.batch import Batch
from model import load_pretrained
from training import NextToken, PretrainConfig, checkpoint, distributed
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.loop import News, Run, StopSignals, Upcoming, Update, explained, held_out_metrics, planned_steps, train
from training.metrics import Metrics
from training.optimizer import learning_rate
from training.saver import Progress, Saver, noted, resume
from training.setup import Start
from training.transfer import Sent

# row i is 3 + i % 4 places long, so that rows weigh differently
ROWS = [[1, 30 + i, *range(5, 7 + i % 4)] for i in range(20)]
EVERY_LINE = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "memory_mb"}


@dataclass
class Documents:
    """A source that is no Loader: row i is ROWS[i]; it notes what it is asked for."""

    total_rows: int = 6
    rows_per_update: int = 2
    ahead: bool = False
    passes: int = 1
    beside: None = None
    tokens_per_row: float = 3.5
    open_prompts: list[list[int]] = field(default_factory=list)
    events: list = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @property
    def rows_per_epoch(self) -> int:
        return 4

    def prompts(self, limit: int) -> list[list[int]]:
        return self.open_prompts[:limit]

    def samples(self):
        return None

    def update(self, position: int) -> list[Batch]:
        self.asked.append(position)
        self.events.append(("asked", position))
        return [one_document(row) for row in range(position, min(position + self.rows_per_update, self.total_rows))]


def one_document(row: int) -> Batch:
    ids = torch.tensor([ROWS[row]])
    tokens = ids.shape[1] - 1
    return Batch.of(ids[:, :-1], ids[:, 1:], torch.arange(tokens)[None], [row], tokens)


class Noted(NextToken):
    """Next-token training that notes which rows it sees, and does to them what a test says."""

    def __init__(self, events: list | None = None, nan_loss: tuple = (), nan_gradient: tuple = ()):
        super().__init__()
        self.events = [] if events is None else events
        self.nan_loss, self.nan_gradient = nan_loss, nan_gradient

    def __call__(self, output, batch):
        (row,) = batch.row_ids
        self.events.append(("learnt", row))
        loss, sums = super().__call__(output, batch)
        if row in self.nan_loss:
            return loss * torch.nan, {"loss": sums["loss"] * torch.nan}
        return (loss * torch.nan if row in self.nan_gradient else loss), sums


@pytest.fixture
def make_parts(make_model, tokenizer, tmp_path):
    """make_parts(source, objective, held_out, dtype, **flags) -> what `train` takes, of a tiny model."""

    def make(source, objective=None, held_out=None, dtype=torch.float32, **flags) -> tuple:
        few = {"log_interval": 1, "save_interval": 0, "optimizer": "adamw", "learning_rate": 1e-3}
        config = PretrainConfig(out_dir=str(tmp_path), dim=32, **(few | flags))
        model = make_model(n_layers=1, max_seq_len=8)
        engine = SingleEngine(model, config, Machine(World(), torch.device("cpu"), dtype))
        start = Start(model, lambda: [], tokenizer, config, 8)
        return engine, objective or NextToken(), source, held_out, start, {"seed": 42}

    return make


@pytest.fixture
def make_run(make_parts):
    """make_run(source, objective, held_out, dtype, **flags) -> Run in tmp_path/pretrain_32."""

    def make(*parts, **flags) -> Run:
        engine, objective, source, held_out, start, identity = make_parts(*parts, **flags)
        config, settings = start.config, noted(start.config, engine, source.rows_per_update)
        progress = resume(engine, config, identity, settings, print)
        steps = planned_steps(source, progress, config.max_steps)
        metrics = Metrics(config.run_dir, {}, stage="pretrain", total_steps=steps, start_step=progress.step)
        saver = Saver(engine, config, start.tokenizer, identity, settings, progress, steps, metrics.print)
        return Run(engine, objective, source, held_out, start, progress, steps, metrics, saver)

    return make


def records(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def parameters(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.engine.model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# What is asked of a source --------------------------------------------------------------------------------------


def test_a_source_is_asked_for_an_update_when_it_is_due_and_not_before(make_run):
    source = Documents(total_rows=6)
    run = make_run(source, Noted(source.events))
    run.loop()
    assert source.events == [
        ("asked", 0), ("learnt", 0), ("learnt", 1),
        ("asked", 2), ("learnt", 2), ("learnt", 3),
        ("asked", 4), ("learnt", 4), ("learnt", 5),
    ]  # fmt: skip


def test_an_update_may_be_learnt_from_several_times_and_is_asked_for_once(make_run):
    source = Documents(total_rows=4, passes=3)
    run = make_run(source, Noted(source.events))
    run.loop()
    learnt = [[("asked", first), *[("learnt", first), ("learnt", first + 1)] * 3] for first in (0, 2)]
    assert source.events == [*learnt[0], *learnt[1]]
    assert run.progress.step == 2 and run.progress.position == 4  # a step is all of them


def test_what_a_source_has_to_read_is_shown_in_place_of_a_sample(make_run, capsys):
    class Written(Documents):
        def samples(self):
            return "6 x 7?", f"answer {self.asked[-1]}"

    make_run(Written(total_rows=4), sample_interval=1).loop()
    said = capsys.readouterr().err
    assert "step 1, sample: 6 x 7? ▸ answer 0" in said and "step 2, sample: 6 x 7? ▸ answer 2" in said


def test_a_source_that_may_be_ahead_makes_the_next_update_while_one_is_learnt(make_run):
    """Each waits for the other, so that neither could come first."""

    class Ahead(Documents):
        def update(self, position):
            making[position].set()
            if position:
                met.append(learning[position - 2].wait(5))
            return super().update(position)

    class Waiting(Noted):
        def __call__(self, output, batch):
            first = batch.row_ids[0] // 2 * 2
            learning[first].set()
            if first + 2 < 6:  # the last update has none after it
                met.append(making[first + 2].wait(5))
            return super().__call__(output, batch)

    making, learning = ({position: threading.Event() for position in range(0, 10, 2)} for _ in range(2))
    met: list[bool] = []
    source, objective = Ahead(total_rows=6, ahead=True), Waiting()
    make_run(source, objective).loop()
    assert met and all(met)
    assert source.asked == [0, 2, 4] and objective.events == [("learnt", row) for row in range(6)]


def test_what_is_learnt_does_not_depend_on_being_ahead(make_run):
    found = []
    for ahead in (False, True):
        run = make_run(Documents(ahead=ahead), resume="none")
        run.loop()
        found.append((parameters(run), run.progress.position, run.progress.tokens))
    assert equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_learning_ends_at_the_last_row_and_the_position_with_it(make_run):
    source, objective = Documents(total_rows=5), Noted()
    run = make_run(source, objective)
    run.loop()
    assert source.asked == [0, 2, 4] and objective.events == [("learnt", row) for row in range(5)]
    assert (run.progress.step, run.progress.position) == (3, 5)
    assert run.progress.tokens == sum(len(ids) - 1 for ids in ROWS[:5])


def test_a_run_cut_short_goes_on_at_its_row_with_another_number_of_rows_an_update(make_run, capsys):
    first = Documents(total_rows=11)
    run = make_run(first, Noted(first.events), max_steps=2)
    run.loop()
    second = Documents(total_rows=11, rows_per_update=3)
    run = make_run(second, Noted(second.events))
    assert run.progress == Progress(2, 4, sum(len(ids) - 1 for ids in ROWS[:4]), run.progress.seconds, schedule_rows=2)
    run.loop()
    assert second.asked == [4, 7, 10] and (run.progress.step, run.progress.position) == (5, 11)
    assert [row for what, row in first.events + second.events if what == "learnt"] == list(range(11))
    assert "note: rows an update was 2 when this checkpoint was saved and is 3 now" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"lr_schedule": "wsd", "decay_fraction": 0.5}, {}, {"warmup_steps": 8}])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_learning_rate_goes_by_the_rows_seen_however_many_an_update_has(make_run, flags, rows):
    """At one position it is what the run that never changed has there."""
    run = make_run(Documents(total_rows=20), **flags)
    expected = {}
    for run.progress.position in range(0, 20, 2):
        expected[run.progress.position] = run.rate()
        run.progress.step += 1
    assert len(set(expected.values())) > 4
    run.source = Documents(total_rows=20, rows_per_update=rows)
    for run.progress.position in range(0, 20, 4):
        assert run.rate() == expected[run.progress.position]


def test_the_learning_rate_of_a_number_of_steps_goes_by_the_step(make_run):
    run = make_run(Documents(total_rows=1 << 60), max_steps=10)
    run.progress.step, run.progress.position = 7, 3
    assert run.rate() == learning_rate(7, 10, run.config)


def test_a_run_that_is_complete_learns_nothing_and_says_so(make_run, capsys):
    make_run(Documents()).loop()
    source = Documents()
    run = make_run(source)
    before = parameters(run)
    run.loop()
    assert source.asked == [] and equal(before, parameters(run))
    assert "this run is complete at step 3; raise --epochs or --max_steps to go on" in capsys.readouterr().err


def test_a_complete_run_keeps_its_record_whatever_flags_are_given(make_run, tmp_path):
    make_run(Documents()).loop()
    record = tmp_path / "pretrain_32/config.yaml"
    before = record.read_text()
    make_run(Documents(), learning_rate=0.5).loop()
    assert record.read_text() == before


def test_another_runs_last_checkpoint_makes_this_runs_model_folder(make_run, tmp_path, capsys):
    make_run(Documents()).loop()
    (tmp_path / "pretrain_32").rename(tmp_path / "other")
    make_run(Documents(), resume=str(tmp_path / "other/checkpoints/step_000003")).loop()
    folder = tmp_path / "pretrain_32"
    assert f"model folder: {folder}" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    assert (folder / "config.yaml").is_file()
    assert make_run(Documents()).progress.step == 3  # the same command goes on from its own checkpoint


@pytest.mark.parametrize(
    ("total_rows", "rows_per_update", "progress", "max_steps", "steps"),
    [
        (12, 4, Progress(), 0, 3),
        (13, 4, Progress(), 0, 4),  # the last update is smaller
        (13, 4, Progress(step=2, position=8), 0, 4),  # left alone, the plan is what it was
        (20, 3, Progress(step=2, position=8), 0, 6),  # 12 rows are left, 3 at a time
        (20, 4, Progress(step=5, position=20), 0, 5),  # complete
        (16, 4, Progress(step=5, position=20), 0, 5),  # fewer epochs than were learnt
        (20, 4, Progress(), 7, 7),  # steps are counted, not rows
        (20, 4, Progress(step=3, position=12), 7, 7),
        (20, 4, Progress(step=9, position=36), 7, 9),
    ],
)
def test_steps_are_planned_from_where_the_run_stands(total_rows, rows_per_update, progress, max_steps, steps):
    assert planned_steps(Documents(total_rows, rows_per_update), progress, max_steps) == steps


# Updates that are not finite ------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped_and_its_rows_are_named(make_run, capsys):
    run = make_run(Documents(), Noted(nan_loss=(1,)), max_steps=1)
    before = parameters(run)
    run.loop()
    assert equal(before, parameters(run)) and run.progress.step == 1
    told = capsys.readouterr().err
    assert "step 1: loss nan, gradient norm nan: update skipped (rank 0, packed rows [[1]])" in told
    assert records(run)[0]["loss"] is None


def test_a_gradient_alone_that_is_not_finite_is_told_apart(make_run, capsys):
    run = make_run(Documents(), Noted(nan_gradient=(0,)))
    run.loop()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert "gradient norm nan: update skipped (the losses are finite, the gradient is not)" in line
    assert [record["grad_norm"] is None for record in records(run)] == [True, False, False]


def test_three_such_updates_in_a_row_stop_the_run_with_its_state_saved(make_run, tmp_path):
    source = Documents(total_rows=16)
    run = make_run(source, Noted(nan_loss=(2, 4, 6)))
    message = r"3 updates in a row were not finite, the last at step 4 \(rank 0, packed rows \[\[6\]\]\)"
    with pytest.raises(ValueError, match=message):
        run.loop()
    assert source.asked == [0, 2, 4, 6]
    folder = tmp_path / "pretrain_32/checkpoints/step_000004"
    assert checkpoint.damage(folder) is None
    assert checkpoint.read_run(folder)["progress"]["position"] == 8


def test_a_finite_update_between_them_starts_the_count_again(make_run):
    run = make_run(Documents(total_rows=10), Noted(nan_loss=(0, 2, 6, 8)))
    run.loop()
    assert run.progress.step == 5


@pytest.mark.parametrize(("updates", "stops"), [(24, False), (25, True)])
def test_float16_has_25_updates_to_find_its_scale_and_tells_of_none(make_run, capsys, updates, stops):
    class Same(Documents):
        def update(self, position):
            return [one_document(0)]

    # the losses are finite, so what is not finite is taken for a scale that is too large
    run = make_run(Same(rows_per_update=1), Noted(nan_gradient=(0,)), dtype=torch.float16, max_steps=updates)
    if stops:
        with pytest.raises(ValueError, match="25 updates in a row were not finite"):
            run.loop()
    else:
        run.loop()
    assert "skipped" not in capsys.readouterr().err


def test_numbers_looked_at_one_update_late_name_the_very_step_and_rows(make_run, capsys):
    run = make_run(Documents(total_rows=16), Noted(nan_loss=(3,), nan_gradient=(8,)), log_interval=100)
    run.loop()
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert told[0].startswith("step 2: loss nan") and "(rank 0, packed rows [[3]])" in told[0]
    assert told[1].startswith("step 5: loss ") and "the losses are finite" in told[1]


def test_a_run_that_stops_for_them_has_saved_the_update_that_was_queued_by_then(make_run, tmp_path):
    source = Documents(total_rows=16)
    run = make_run(source, Noted(nan_loss=(2, 4, 6)), log_interval=100)
    with pytest.raises(ValueError, match=r"3 updates in a row were not finite, the last at step 4 \(rank 0"):
        run.loop()
    assert source.asked == [0, 2, 4, 6, 8]
    assert checkpoint.read_run(tmp_path / "pretrain_32/checkpoints/step_000005")["progress"]["position"] == 10
    after = make_run(Documents(total_rows=16), log_interval=100)
    assert after.progress.step == 5 and equal(parameters(after), parameters(run))


@pytest.mark.parametrize("due", [{"save_interval": 4}, {"log_interval": 4}, {"eval_interval": 4}])
def test_what_is_due_waits_for_the_numbers_of_its_own_update(make_run, due):
    """The third such update in a row is the fourth of all, and nothing is written or learnt beyond it."""
    flags = {"log_interval": 100, "save_interval": 0, "eval_interval": 0} | due
    source = Documents(total_rows=16)
    with pytest.raises(ValueError, match="the last at step 4"):
        make_run(source, Noted(nan_loss=(2, 4, 6)), Documents(), **flags).loop()
    assert source.asked == [0, 2, 4, 6]


@pytest.mark.parametrize("ahead", [False, True])
def test_lines_are_the_same_however_often_they_are_written(make_run, ahead):
    found = {}
    for interval in (1, 3):
        run = make_run(Documents(total_rows=14, ahead=ahead), log_interval=interval, resume="none")
        run.loop()
        found[interval] = {record["step"]: record for record in records(run)}
    assert list(found[3]) == [3, 6, 7]
    for step, record in found[3].items():
        same = {"step", "epoch", "loss", "lr", "grad_norm", "tokens"}
        assert {name: record[name] for name in same} == {name: found[1][step][name] for name in same}


# What ranks tell each other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "asked_in", "stopped_after"), [(True, 3, 4), (False, 3, 4), (True, 1, 2)])
def test_all_ranks_stop_at_one_step_though_one_was_asked(ahead, asked_in, stopped_after):
    """One update later than the rank that was asked would have. Ranks are threads here, their sum is a real one."""
    meeting, told, ended = threading.Barrier(2, timeout=10), [False, False], [0, 0]

    def rank(number: int) -> None:
        def count(micro_batches, news):
            told[number] = news.stop
            meeting.wait()
            stop = any(told)
            meeting.wait()
            return Update(Sent(micro_batches), 1.0, 1.0, 1.0, News(stop, False))

        asked = False
        source = Documents(total_rows=20, ahead=ahead)
        with Upcoming(source, 10, count, lambda: News(asked, False), alone=False) as upcoming:
            for step in range(1, 11):
                upcoming.take(source.rows_per_update * (step - 1))
                asked = asked or (number == 1 and step == asked_in)
                ended[number] = step
                if upcoming.news().stop:
                    break

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [stopped_after, stopped_after]


@pytest.mark.parametrize("ahead", [False, True])
def test_news_is_heard_once(ahead):
    """What all ranks have done their part of is taken a step further once for each time they say so."""
    said = iter([True, False, True, True, False])
    with Upcoming(
        Documents(total_rows=10, ahead=ahead), 5, lambda _, news: Update(Sent([]), 1.0, 1.0, 1.0, news),
        lambda: News(False, next(said)), alone=False,
    ) as upcoming:  # fmt: skip
        heard = []
        for position in range(0, 10, 2):
            upcoming.take(position)
            heard.append(upcoming.news().written)
    assert heard == [True, False, True, True, False]


def test_one_process_asks_nobody(make_run, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    for name in ("all_reduce", "all_gather_object", "new_group", "barrier"):
        monkeypatch.setattr(dist, name, refused)
    run = make_run(Documents(ahead=True), log_interval=2, save_interval=2)
    run.loop()
    assert run.progress.step == 3


# Signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_asks_and_the_handlers_come_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_asked_to_stop_saves_after_its_update_without_a_validation(make_run, capsys, tmp_path):
    class Interrupted(Documents):
        def update(self, position):
            if position == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().update(position)

    source, held_out = Interrupted(total_rows=10), Documents()
    run = make_run(source, held_out=held_out, eval_interval=2)
    run.loop()
    assert source.asked == [0, 2] and held_out.asked == []
    assert "stopped at step 2 of 5; the same command continues from here" in capsys.readouterr().err
    assert checkpoint.damage(tmp_path / "pretrain_32/checkpoints/step_000002") is None


# What is said ---------------------------------------------------------------------------------------------------


def test_held_out_metrics_are_a_mean_taken_once_over_all_rows(make_run):
    held_out = Documents(total_rows=5)  # the last update has one row, and rows weigh differently
    sizes = torch.arange(97)
    run = make_run(Documents())
    found = held_out_metrics(run.engine, NextToken(sizes), held_out)
    total = tokens = size = 0.0
    for ids in ROWS[:5]:
        logits = run.engine.model(torch.tensor([ids[:-1]]))[0]
        total += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
        size += sum(ids[1:])
    assert held_out.asked == [0, 2, 4]
    assert found["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["val_bpb"] == pytest.approx(total / size / torch.tensor(2.0).log().item(), rel=1e-5)
    assert held_out_metrics(run.engine, NextToken(sizes), held_out) == found


def test_a_line_has_its_names_and_what_is_for_held_out_rows_alone_is_in_no_other(make_run):
    held_out = Documents(total_rows=2)
    run = make_run(Documents(total_rows=10), NextToken(torch.ones(97)), held_out, eval_interval=2)
    run.loop()
    found = records(run)
    validated = EVERY_LINE | {"val_loss", "val_bpb"}
    assert [set(record) for record in found] == [EVERY_LINE, validated, EVERY_LINE, validated, validated]
    assert [record["epoch"] for record in found] == [0.5, 1, 1.5, 2, 2.5]  # 4 rows make an epoch
    tokens = [sum(len(ids) - 1 for ids in ROWS[: 2 * step]) for step in range(1, 6)]
    assert [record["tokens"] for record in found] == tokens
    assert all(record["tokens_per_second"] > 0 for record in found)


def test_no_share_of_a_peak_is_reported_on_a_cpu(make_run, capsys):
    make_run(Documents()).loop()
    assert "MFU" not in capsys.readouterr().err
    run = make_run(Documents(), resume="none")
    run.peak_flops = 1e9  # as on a GPU
    run.loop()
    assert all(record["mfu"] > 0 for record in records(run)) and "MFU" in capsys.readouterr().err


def test_a_line_holds_the_loss_of_its_own_update_alone(make_run):
    run = make_run(Documents(total_rows=8), log_interval=4, learning_rate=1e-12)
    run.loop()
    (record,) = records(run)
    total = sum(
        F.cross_entropy(run.engine.model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="sum").item()
        for ids in ROWS[6:8]
    )
    assert record["loss"] == pytest.approx(total / sum(len(ids) - 1 for ids in ROWS[6:8]), rel=1e-4)


def test_what_is_weighed_is_counted_by_the_second_where_it_is_not_tokens(make_run):
    class Rows(Noted):
        unit = "rows"

        def weight(self, batch):
            return 1

    run = make_run(Documents(), Rows())
    run.loop()
    assert all(set(record) == EVERY_LINE | {"rows_per_second"} for record in records(run))
    assert all(record["rows_per_second"] < record["tokens_per_second"] for record in records(run))


def test_lines_are_due_by_log_interval_and_the_last_step_always(make_run):
    run = make_run(Documents(total_rows=10), log_interval=2)
    run.loop()
    assert [record["step"] for record in records(run)] == [2, 4, 5]


def test_a_run_begins_with_a_line_that_says_what_is_trained(make_run, capsys, tmp_path):
    run = make_run(Documents(total_rows=6), max_steps=2)
    size = run.engine.model.num_parameters() / 1e6
    folder = tmp_path / "pretrain_32"
    run.loop()
    first = f"pretrain: {size:.3f} M parameters, context 8, on cpu in float32, single on 1 rank; "
    rows = "of 2 rows (about 7 tokens) by adamw at 0.001; "
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{first}steps 1 to 2 {rows}from random weights, seed 42; into {folder}"
    )
    make_run(Documents(total_rows=6), max_steps=3, init_from="out/wide", seed=7).loop()
    assert f"{first}steps 3 to 3 {rows}from out/wide; into {folder}" in capsys.readouterr().err.splitlines()


def test_what_an_objective_warns_of_is_said(make_run, capsys):
    class Worried(Noted):
        def warnings(self, record):
            return [f"loss {record['loss'] > 0} at step {record['step']}"] if record["step"] == 2 else []

    make_run(Documents(), Worried()).loop()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert told == ["warning: loss True at step 2"]


# The best model -------------------------------------------------------------------------------------------------


class Forgetting(Noted):
    """Gets better until row 4 is learnt, and worse from then on."""

    def __call__(self, output, batch):
        loss, sums = super().__call__(output, batch)
        learnt = [row for event, row in self.events if event == "learnt"]
        return (loss if max(learnt) < 4 else -100 * loss), sums


PATIENT = {"keep_best": "val_loss", "patience": 3, "eval_interval": 1, "learning_rate": 1e-2, "warmup_steps": 0}


def test_patience_ends_a_run_that_gains_nothing_and_leaves_the_best_and_the_last_model(make_run, capsys, tmp_path):
    run = make_run(Documents(total_rows=20), Forgetting(), Documents(total_rows=2), **PATIENT)
    run.loop()
    values = {record["step"]: record["val_loss"] for record in records(run)}
    assert list(values) == [1, 2, 3, 4, 5] and min(values, key=values.get) == 2
    best, folder = f"val_loss {values[2]:.4f} of step 2", tmp_path / "pretrain_32"
    said = capsys.readouterr().err.splitlines()
    assert f"{best} is the best so far: kept in {folder}/best" in said
    ending = [
        f"ended at step 5 of 10 by --patience 3: none since was better than {best}; a larger --patience goes on",
        f"model folder: {folder}",
        f"best model: {folder}/best ({best})",
    ]
    assert said[-3:] == ending
    last, kept = load_pretrained(folder).state_dict(), load_pretrained(folder / "best").state_dict()
    assert equal(last.values(), parameters(run)) and not equal(last.values(), kept.values())

    again = make_run(Documents(total_rows=20), Forgetting(), Documents(total_rows=2), **PATIENT)
    again.loop()  # the same command
    assert again.source.asked == [] and capsys.readouterr().err.splitlines()[-3:] == ending
    more = make_run(Documents(total_rows=20), Forgetting(), Documents(total_rows=2), **PATIENT | {"patience": 4})
    more.loop()
    assert more.source.asked == [10] and more.progress.best_step == 2


def test_a_resumed_run_knows_its_best(make_run, tmp_path):
    flags = {"keep_best": "val_loss", "eval_interval": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    run = make_run(Documents(), Forgetting(), Documents(total_rows=2), **flags, max_steps=3)
    run.loop()
    assert (run.progress.best_step, run.progress.waited) == (2, 1)
    resumed = make_run(Documents(), Forgetting(), Documents(total_rows=2), **flags, max_steps=6)
    assert resumed.progress == run.progress and resumed.progress.best_value > 0


@pytest.mark.parametrize(
    ("metric", "held_out", "message"),
    [
        ("val_bbp", True, "--keep_best is 'val_bbp'; pretrain can keep the best model by val_loss$"),
        ("val_bpb", True, "--keep_best is 'val_bpb'; pretrain can keep the best model by val_loss$"),
        ("loss", True, "--keep_best is 'loss'; pretrain can"),
        ("val_loss", False, "--keep_best val_loss needs held-out rows, and this data has none; give --val_path"),
    ],
)
def test_what_is_not_measured_tells_no_best_model(make_parts, tmp_path, metric, held_out, message):
    parts = make_parts(Documents(), held_out=Documents() if held_out else None, keep_best=metric)
    with pytest.raises(ValueError, match=message):
        train(*parts)
    assert not (tmp_path / "pretrain_32").exists()


# Errors that say what to do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes"),
    ],
    ids=["class", "cuda", "cpu", "windows"],
)
def test_memory_that_runs_out_says_which_flags_help(make_run, error):
    run = make_run(Documents(), batch_size=12)
    run.progress.step = 7
    with pytest.raises(ValueError, match="out of memory on cpu at step 7: lower --batch_size") as found, explained(run):
        raise error
    assert "now 12" in str(found.value) and "--grad_checkpointing" in str(found.value)


def test_training_explains_what_went_wrong_in_it(make_parts):
    class Large(Noted):
        def __call__(self, output, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="out of memory on cpu at step 0"):
        train(*make_parts(Documents(), Large()))


GLOO = RuntimeError(
    "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234. This is typically caused by a "
    "remote worker crashing. Check the logs of the remote worker.\nframes"
)
NCCL = dist.DistBackendError("NCCL watchdog thread\nframes")


@pytest.mark.parametrize(
    ("error", "words"), [(GLOO, "Connection closed by peer [127.0.0.1]:1234"), (NCCL, "NCCL watchdog thread")]
)
def test_a_rank_that_is_gone_says_how_to_go_on(make_run, error, words):
    run = make_run(Documents())
    run.progress.step = 7
    distributed.start(World(), torch.device("cpu"))
    try:
        with pytest.raises(ValueError, match="rank 0 lost contact with another rank after") as found, explained(run):
            raise error
    finally:
        distributed.stop()
    assert f"after step 7 ({words}); the newest checkpoint stands, and the same command goes on" in str(found.value)


@pytest.mark.parametrize("error", [GLOO, RuntimeError("shapes do not match"), KeyError("x")], ids=str)
def test_other_errors_stay_what_they_are(make_run, error):
    with pytest.raises(type(error)) as found, explained(make_run(Documents())):
        raise error
    assert found.value is error
