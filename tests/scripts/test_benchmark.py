"""The benchmark counts real tokens alone, and its other side does the same work. Nothing here is timed."""

import io
import json
import re
from argparse import Namespace
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset.loader import PairRows, TextRows
from model import GPT, GPTConfig
from scripts import benchmark
from scripts import benchmark_report as report
from scripts.benchmark_baseline import next_token_loss, pad, padded_batches, pair_loss, sequences, their_model
from scripts.benchmark_clock import Rates, Timed, Work, products
from scripts.benchmark_profile import GROUPS, OTHER
from tests.conftest import TINY as TINY_SHAPE
from tests.conftest import encoded
from tests.helpers import TINY, make_data
from training import ALONE, DPO, DPOConfig, NextToken
from training.distributed import World
from training.engines import Machine
from training.objectives import Output, answer_logps

FILES = ("pretrain.jsonl", "sft.jsonl", "dpo.jsonl")
LENGTHS = (9, 20, 33, 5, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark")
    make_data(path)
    return path


def parsed(folder: Path, *flags: Any) -> tuple[Namespace, list[str]]:
    files = ["--data_path", *(folder / name for name in FILES), "--cache_dir", folder / "cache"]
    shape = ["--dim", 32, *TINY, "--batch_size", 2, "--max_steps", 1, "--prompt_tokens", 8, "--new_tokens", 4]
    return benchmark.parse([str(word) for word in (*files, *shape, *flags)])


def said(arguments: Namespace, rest: list[str]) -> str:
    """What it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        benchmark.main(arguments, rest, next(iter(benchmark.configs(arguments, rest).values())))
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """One run of all parts; first.json has what it measured."""
    return said(*parsed(folder, "--json", folder / "first.json", "--markdown", "--profile", folder / "traces"))


# What is counted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ALONE)
def test_an_updates_tokens_are_the_loaders_real_ones(folder: Path, stage: str) -> None:
    config = benchmark.configs(*parsed(folder))[stage]
    machine = Machine(World(), torch.device("cpu"), torch.float32)
    start, data = benchmark.load(config, machine)
    objective = ALONE[stage].objective(config)
    ours = benchmark.Ours(start, data, machine, objective)
    places = 0
    for step in range(3):
        batches = data.train.update(step * data.train.rows_per_update)
        places += sum(batch.input_ids.numel() for batch in batches)
        work = ours.prepare(step)()
        assert work.tokens == sum(batch.real_tokens for batch in batches)
        assert work.weight == sum(objective.weight(batch) for batch in batches)
        places -= int(work.tokens)
    assert places > 0  # there was padding to be left out


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qk_norm": True, "head_dim": 20}])
def test_the_products_of_the_models_own_shapes_are_six_n_operations_a_token(changes: dict[str, Any]) -> None:
    config = GPTConfig(**(TINY_SHAPE | changes))
    flops = sum(count * 6 * out * into for (out, into), count in products(GPT(config)).items())
    assert flops == config.flops_per_token(0)


def test_padded_batches_hold_every_document_once_an_epoch_within_the_places_given() -> None:
    ids = [list(range(1, length + 1)) for length in LENGTHS]
    rows = TextRows(encoded(ids=ids), 64, 0)
    batches = list(islice(padded_batches(rows.encoded.columns, 64, 66, seed=0), 12))
    lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(1)]
    assert sorted(lengths[:5]) == sorted(lengths[5:10]) == sorted(LENGTHS)
    for batch in batches:
        assert batch.input_ids.numel() <= 66
        assert batch.real_tokens == int((batch.attention_mask.sum(1) - 1).sum())
    assert any(batch.items > 1 for batch in batches)


# The same work -------------------------------------------------------------------------------------------------------


def their_twin(model: GPT) -> Any:
    twin = their_model(model.config, model.state_dict().items).eval()
    assert sum(p.numel() for p in twin.parameters()) == model.num_parameters()
    return twin


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qk_norm": True}])
@pytest.mark.parametrize("spans", [None, [[4, 8], [2, 5, 11, 20], [30, 33], [3, 5], [6, 12]]])
def test_their_loss_of_padded_documents_is_ours_of_packed_ones(
    make_model: Any, changes: dict[str, Any], spans: list[list[int]] | None
) -> None:
    ours = make_model(**changes)
    ids = [torch.randint(4, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    rows = TextRows(encoded(ids=ids, **({} if spans is None else {"spans": spans})), 96, 0)  # 74 places: none is split
    batch = rows.collate(list(range(len(rows))))
    total, _ = NextToken()(Output(ours(batch.input_ids, batch.position_ids, batch.labels)), batch)
    padded = pad([sequences(row, 96) for row in rows.encoded.columns.to_pylist()])
    theirs = next_token_loss(their_twin(ours), None, padded, DPOConfig())
    assert padded.real_tokens == batch.real_tokens
    assert float(theirs.detach()) == pytest.approx(float(total.detach()) / batch.supervised, rel=1e-5)


def test_their_loss_of_pairs_is_ours(make_model: Any) -> None:
    ours, before, config = make_model(0), make_model(1), DPOConfig(beta=0.3)
    sides = [
        [torch.randint(4, 97, (n,), generator=torch.Generator().manual_seed(seed + n)).tolist() for n in LENGTHS]
        for seed in (0, 100)
    ]
    prompt = [3, 7, 20, 2, 6]
    for chosen, rejected, length in zip(*sides, prompt, strict=True):
        rejected[:length] = chosen[:length]
    rows = PairRows(encoded(chosen=sides[0], rejected=sides[1], prompt=prompt), 64, 0)
    rows.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)
    batch = rows.collate(list(range(len(rows))))
    with torch.no_grad():
        batch.reference = answer_logps(Output(before(batch.input_ids, batch.position_ids, batch.labels)), batch)
        total, _ = DPO(config.beta)(Output(ours(batch.input_ids, batch.position_ids, batch.labels)), batch)
    padded = pad([sequences(row, 64) for row in rows.encoded.columns.to_pylist()])
    theirs = pair_loss(their_twin(ours), their_twin(before), padded, config)
    assert padded.items == batch.n_pairs and padded.real_tokens == batch.real_tokens + rows.shared.sum()
    assert float(theirs.detach()) == pytest.approx(float(total) / batch.n_pairs, rel=1e-4)


# From updates to numbers ---------------------------------------------------------------------------------------------


def timed(seconds: list[float], tokens: list[float]) -> Timed:
    return Timed(9.0, seconds, [Work(each, each / 10) for each in tokens], peak_mb=500.0)


def test_a_line_has_medians_of_speeds_and_of_ratios_round_by_round() -> None:
    ours, theirs = timed([1, 2, 1], [100, 100, 120]), timed([1, 4, 1], [50, 100, 100])
    found = report.line("dpo", "real tokens", {}, {"ours": ours, "theirs": theirs}, "pairs")
    assert (found.ours.per_second, found.ours.low, found.ours.high) == (100, 50, 120)
    assert found.ours.weight_per_second == 10 and found.ours.first_seconds == 9 and found.ours.peak_mb == 500
    assert found.theirs is not None and found.theirs.per_second == 50
    assert found.ratio == pytest.approx((2, 1.2, 2))


def test_a_share_is_six_n_a_token_of_the_rate_of_its_round_over_all_ranks() -> None:
    shape = GPTConfig(**TINY_SHAPE)
    found = report.line("pretrain", "real tokens", {}, {"ours": timed([1, 1, 1], [100, 200, 100])})
    flops = 100 * shape.flops_per_token(0)
    rates = Rates(products(GPT(shape)), 64, torch.device("cpu"), torch.float32)
    rates.own, rates.square = [flops, 4 * flops, 2 * flops], [flops] * 3
    report.add_ceiling(found, rates, 2, shape, 64, 50 * shape.flops_per_token(64))
    assert found.ours.own_share == pytest.approx(0.25) and found.own_rate == 4 * flops  # shares: 1/2, 1/4, 1/4
    assert found.ours.square_share == pytest.approx(0.5) and found.ours.mfu == pytest.approx(1.0)


# What it says --------------------------------------------------------------------------------------------------------


def test_the_json_has_every_part_and_both_sides_of_it(printed: str, folder: Path) -> None:
    told = json.loads((folder / "first.json").read_text())
    assert {"cpu", "gpu", "threads", "ranks", "dtype", "torch", "transformers", "commit", "date"} <= told[
        "machine"
    ].keys()
    lines = {line["name"]: line for line in told["lines"]}
    assert list(lines) == [
        *ALONE,
        *(f"decode {rows}, {how}" for rows in ("1 row", "32 rows") for how in ("greedy", "sampled")),
        *(f"input {stage}, {what}" for stage in ALONE for what in ("collating", "tokenizing")),
    ]
    for name, line in lines.items():
        for side in [line["ours"]] if "tokenizing" in name else [line["ours"], line["theirs"]]:
            assert side["low"] <= side["per_second"] <= side["high"]
            assert all(number > 0 for number in (*side["seconds"], *side["tokens"]))
            assert (side["own_share"] is not None) == (name in ALONE) == (side["square_share"] is not None)
    assert lines["dpo"]["weighed"] == "pairs" and lines["dpo"]["theirs"]["weight_per_second"] > 0
    assert lines["decode 32 rows, greedy"]["ours"]["tokens"] == [32 * 4]
    assert lines["decode 32 rows, sampled"]["theirs"]["tokens"] == [32 * 4]


def test_the_markdown_table_has_the_lines_of_the_other(printed: str) -> None:
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    names = [row[0].removeprefix("| ") for row in rows]
    assert names[:1] == ["line"] and {"pretrain, real tokens/s", "dpo, pairs/s"} <= set(names)


def test_a_profile_leaves_a_trace_and_finds_the_products(printed: str, folder: Path) -> None:
    for stage in ALONE:
        for side in ("ours", "theirs"):
            events = json.loads((folder / f"traces/{stage}_{side}.json").read_text())["traceEvents"]
            assert any(event["name"] == "aten::mm" for event in events)
            assert "aten::mm" in (folder / f"traces/{stage}_{side}.txt").read_text()
    for group in (*GROUPS, OTHER):
        cells = re.findall(rf"│ {group} +│ +([\d.,]+) ", printed)
        assert len(cells) == len(ALONE)
        assert group == OTHER or all(float(cell.replace(",", "")) > 0 for cell in cells), group


def test_a_later_run_is_compared_with_an_earlier_one(printed: str, folder: Path) -> None:
    earlier = report.read(folder / "first.json")
    again = said(*parsed(folder, "--stages", "pretrain", "--no_baseline", "--compare", folder / "first.json"))
    now = re.search(r"│ pretrain, real +│ +([\d,.]+) +│ +([\d,.]+) +│ +([\d.]+) ", again.split("now / earlier")[1])
    if now is None:  # a wide terminal breaks no cell
        now = re.search(r"│ pretrain, real tokens/s +│ +([\d,.]+) +│ +([\d,.]+) +│ +([\d.]+) ", again)
    assert now is not None and now[1] == report.number(earlier.lines[0].ours.per_second)
    before, after, ratio = (float(number.replace(",", "")) for number in now.groups())
    assert ratio == pytest.approx(after / before, rel=0.02, abs=0.01)
    assert "dpo: only in one of the two runs" in again and "not comparable" not in again


def test_a_comparison_says_what_is_not_the_same(printed: str, folder: Path) -> None:
    earlier, now = (report.read(folder / "first.json") for _ in range(2))
    assert report.differences(earlier, now) == []
    now.machine |= {"cpu": "another", "dtype": "bfloat16"}
    now.lines[0].shape["dim"] = 64
    found = report.differences(earlier, now)
    assert "cpu: " in found[0] and "another now: the speeds are not comparable" in found[0]
    assert found[1] == "dtype: float32 then, bfloat16 now: the speeds are not comparable"
    assert found[2:] == ["pretrain: not the same work: dim 32 then, 64 now"]


def test_another_file_is_no_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"machine": {}}')
    with pytest.raises(ValueError, match="other.json: found no run of this benchmark .*expected what --json wrote"):
        report.read(path)


# Flags ---------------------------------------------------------------------------------------------------------------


def test_files_go_to_the_stages_that_read_their_rows(folder: Path) -> None:
    found = benchmark.configs(*parsed(folder))
    assert {name: [Path(path).name for path in config.data_path] for name, config in found.items()} == dict(
        zip(ALONE, ([name] for name in FILES), strict=True)
    )
    assert {config.init_from for config in found.values()} == {"none"}


def test_a_stage_without_a_file_is_told(folder: Path) -> None:
    arguments, rest = benchmark.parse(["--stages", "dpo", "--data_path", str(folder / "sft.jsonl")])
    with pytest.raises(ValueError, match="no file has rows of dpo"):
        benchmark.configs(arguments, rest)


def test_flags_of_a_stage_reach_it_and_unknown_ones_are_told() -> None:
    found = benchmark.configs(*benchmark.parse(["--stages", "dpo", "--beta", "0.3", "--dim", "64"]))
    assert found["dpo"].dim == 64 and found["dpo"].beta == 0.3 and found["dpo"].max_steps == benchmark.UPDATES
    with pytest.raises(ValueError, match="n_layer"):
        benchmark.configs(*benchmark.parse(["--n_layer", "2"]))
