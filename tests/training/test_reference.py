"""DPO's reference: one of its own for every model, on any device, however many runs compute it at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dataset import Loader
from dataset.loader import ENDLESS, PairRows
from evaluation.scoring import labelled, summed_nll
from tests.conftest import encoded
from training import DPOConfig, frozen, reference
from training.distributed import World
from training.engines import Machine, SingleEngine
from training.frozen import FrozenOutputs
from training.reference import fill_reference


@pytest.fixture
def fill(make_model, tmp_path):
    """fill(**changes to the model's config) -> the rows' reference, cached in tmp_path."""

    def make(**changes) -> np.ndarray:
        columns = {"chosen": [[1, 5, 6, 7], [1, 8, 9]], "rejected": [[1, 5, 9], [1, 8, 5, 6]], "prompt": [2, 2]}
        rows = PairRows(encoded(**columns), max_seq_len=8, pad_id=3)
        config = DPOConfig(cache_dir=str(tmp_path), batch_size=2)
        model = make_model(n_layers=1)
        changed = type(model)(replace(model.config, **changes))
        changed.load_state_dict(model.state_dict())
        engine = SingleEngine(changed, config, Machine(World(), torch.device("cpu"), torch.float32))
        fill_reference(Loader(rows, 2), engine, config, "hash of the weights")
        assert rows.reference is not None
        return rows.reference

    return make


def test_a_reference_is_computed_once(fill, monkeypatch):
    first = fill()
    monkeypatch.setattr(FrozenOutputs, "fill", None)
    assert (fill() == first).all() and (fill(dropout=0.5) == first).all()


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 100.0}, {"norm_eps": 1.0}, {"n_heads": 2, "n_kv_heads": 1, "head_dim": 16}]
)
def test_equal_weights_in_another_config_have_a_reference_of_their_own(fill, changes):
    assert not np.allclose(fill(), fill(**changes))


def test_another_version_of_the_code_computes_it_anew(fill, monkeypatch, tmp_path):
    fill()
    monkeypatch.setattr(reference, "VERSION", reference.VERSION + 1)
    fill()
    assert len(list(tmp_path.glob("reference-*.pt"))) == 2


def test_runs_that_compute_the_same_reference_do_not_share_a_half_written_file(fill, monkeypatch, tmp_path):
    """The second begins, and ends, while the first is about to rename what it has written."""
    rename = frozen.os.replace
    parts: list[Path] = []

    def interrupted(part: Path, path: Path) -> None:
        parts.append(part)
        if len(parts) == 1:
            second = fill()
            assert sorted(torch.load(path, weights_only=True)[0].tolist()) == sorted(second.tolist())
        rename(part, path)

    monkeypatch.setattr(frozen.os, "replace", interrupted)
    fill()
    assert len(set(parts)) == 2 and len(list(tmp_path.iterdir())) == 1


def many_pairs(tmp_path, make_model, **flags) -> tuple[SingleEngine, DPOConfig, Callable[[], Loader]]:
    """An engine, a config of three steps, and what makes a loader of twelve rows, a pair each."""
    chosen = [[1, 5, 6, *range(10, 20 + i % 3)] for i in range(12)]
    columns = {"chosen": chosen, "rejected": [[*ids[:3], 7, *ids[4:]] for ids in chosen], "prompt": [3] * 12}
    data = encoded(**columns)
    config = DPOConfig(**({"cache_dir": str(tmp_path), "out_dir": str(tmp_path), "dim": 32, "max_steps": 3} | flags))
    engine = SingleEngine(make_model(n_layers=1), config, Machine(World(), torch.device("cpu"), torch.float32))
    return engine, config, lambda: Loader(PairRows(data, max_seq_len=14, pad_id=3), 2, total_rows=ENDLESS)


def test_a_run_of_few_steps_waits_for_its_own_pairs_alone(tmp_path, make_model):
    engine, config, loader = many_pairs(tmp_path, make_model)
    few, more, all_of_them = loader(), loader(), loader()
    assert len(few.rows) == 12
    fill_reference(few, engine, config, "weights")
    known = ~np.isnan(few.rows.reference).any(1)
    seen = {pair for step in range(3) for batch in few.update(2 * step) for pair in batch.pair_ids}
    assert set(np.flatnonzero(known)) == seen and len(seen) == 6
    with pytest.raises(ValueError, match="these pairs have no reference"):
        few.update(6)
    fill_reference(more, engine, replace(config, max_steps=5), "weights")
    fill_reference(all_of_them, engine, replace(config, max_steps=6), "weights")
    assert (~np.isnan(more.rows.reference).any(1)).sum() == 10
    assert (few.rows.reference[known] == all_of_them.rows.reference[known]).all()
    assert not np.isnan(all_of_them.rows.reference).any()


def test_only_pairs_that_no_run_has_come_to_are_asked_about(tmp_path, make_model, monkeypatch):
    engine, config, loader = many_pairs(tmp_path, make_model)
    fill_reference(loader(), engine, config, "weights")
    asked: list[int] = []
    fill = FrozenOutputs.fill
    monkeypatch.setattr(
        FrozenOutputs,
        "fill",
        lambda self, tables, wanted, *rest: (asked.extend(wanted), fill(self, tables, wanted, *rest)),
    )
    fill_reference(loader(), engine, config, "weights")
    assert asked == []
    fill_reference(loader(), engine, replace(config, max_steps=4), "weights")
    assert asked == sorted(loader().order(0)[6:8].tolist())


def test_a_run_whose_updates_were_larger_before_comes_to_more_rows(tmp_path, make_model):
    """Two steps of four rows are saved; three more of two make fourteen rows, not ten."""
    _, config, loader = many_pairs(tmp_path, make_model, max_steps=5)
    saved = config.run_dir / "checkpoints" / "step_00000002"
    saved.mkdir(parents=True)
    (saved / "run.json").write_text(json.dumps({"progress": {"step": 2, "position": 8}}))
    assert frozen.last_position(loader(), config) == 14
    assert frozen.last_position(loader(), replace(config, max_steps=3)) == 10
    assert frozen.last_position(Loader(loader().rows, 2, total_rows=7), config) == 7


class Moves(TorchFunctionMode):
    """Notes what is moved to the CPU and what becomes float64, in order: Apple's GPUs have no float64."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cpu, torch.Tensor.double):
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_float64_begins_on_the_cpu(fill, make_model):
    with Moves() as moves:
        fill()
    assert moves.calls == ["cpu"]  # one batch, whose numbers stay in float32
    with Moves() as moves:
        summed_nll(make_model(), [labelled([1, 40, 41, 2], [2, 4])], batch_size=1)
    assert moves.calls == ["cpu", "double"]
