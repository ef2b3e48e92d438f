"""DPO's reference: one of its own for every model, on any device, however many runs compute it at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dataset.loader import PairRows
from evaluation.scoring import labelled, summed_nll
from tests.conftest import encoded
from training import DPOConfig, reference
from training.distributed import World
from training.engines import Machine, SingleEngine
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
        fill_reference(rows, engine, config, "hash of the weights")
        assert rows.reference is not None
        return rows.reference

    return make


def test_a_reference_is_computed_once(fill, monkeypatch):
    first = fill()
    monkeypatch.setattr(reference, "compute_reference", None)
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
    rename = reference.os.replace
    parts: list[Path] = []

    def interrupted(part: Path, path: Path) -> None:
        parts.append(part)
        if len(parts) == 1:
            second = fill()
            assert (torch.load(path, weights_only=True).numpy() == second).all()
        rename(part, path)

    monkeypatch.setattr(reference.os, "replace", interrupted)
    fill()
    assert len(set(parts)) == 2 and len(list(tmp_path.iterdir())) == 1


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
    assert moves.calls[:2] == ["cpu", "double"]
    with Moves() as moves:
        summed_nll(make_model(), [labelled([1, 40, 41, 2], [2, 4])], batch_size=1)
    assert moves.calls == ["cpu", "double"]
