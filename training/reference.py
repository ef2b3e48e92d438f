"""DPO's reference: what the frozen starting model thinks of every answer, computed once and cached.

    prepare_reference(loader, objective, engine, config, start_hash)    where the loss has one, and nothing where not
    fill_reference(loader, engine, config, start_hash)    loader.rows.reference = float32 (pairs, 2), nats

It is two more columns of the batch, chosen and rejected, so that the loss is a pure function of tensors and no second
model is held. Pairs that the run does not come to are left out (they are not a number) until another run does.
"""

import contextlib
import json

import numpy as np
import torch

from dataset import Loader
from dataset.loader import PairRows
from model.adapters import switched_off
from training.adapting import newly_adapted
from training.config import Config
from training.engines.contract import Engine
from training.frozen import FrozenOutputs, Tables
from training.objectives import DPO, answer_logps

VERSION = 3  # raise it when the same model and pairs give other numbers, so that old caches are left alone


def prepare_reference(loader: Loader, objective: DPO, engine: Engine, config: Config, start_hash: str) -> None:
    """The reference of a loader's rows and of those beside them; for a loss without one nobody is asked."""
    for each in filter(None, (loader, loader.beside)):
        if objective.loss.reference:
            fill_reference(each, engine, config, start_hash)
        else:
            assert isinstance(each.rows, PairRows)
            each.rows.reference = np.zeros((each.rows.n_pairs, 0), dtype=np.float32)


def fill_reference(loader: Loader, engine: Engine, config: Config, start_hash: str) -> None:
    """Log-probabilities of the answers that a run will see, under the starting model, whose weights have this hash: the
    model as it stands, without an adapter that is new (a prefix would be heard at once).

    The cache is keyed by the model (weights and config), the data, the precision (in which engines differ where it is
    not float32) and the version of this code.
    """
    rows = loader.rows
    assert isinstance(rows, PairRows)
    rows.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)  # batches need one; nobody looks at this one

    def ask(row_ids: list[int]) -> Tables:
        batch = rows.collate(row_ids).to(engine.device)
        return (answer_logps(engine.per_place(batch), batch),)

    precision = "float32" if engine.dtype == torch.float32 else f"{engine.dtype} {engine.name}"
    shape = json.dumps(engine.model.config.to_hf(), sort_keys=True)  # equal weights turn by other angles elsewhere
    made_of = f"{VERSION} {start_hash} {shape} {precision}"
    blank = (torch.full((rows.n_pairs, 2), torch.nan),)
    new = newly_adapted(engine.model, config.init_from)
    with switched_off(engine.model) if new else contextlib.nullcontext():
        (known,) = FrozenOutputs("reference", made_of, rows.packing.offsets, blank, ask).of(loader, engine, config)
    rows.reference[rows.packing.document] = known  # which is in the order of the rows
