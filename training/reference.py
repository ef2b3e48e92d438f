"""DPO's reference: what the frozen starting model thinks of every answer, computed once and cached.

    fill_reference(rows, engine, config, start_hash)      rows.reference = float32 (pairs, 2), nats; chosen, rejected

It is two more columns of the batch, so that the loss is a pure function of tensors and no second model is held.
"""

import copy
import json
import os
import secrets
from pathlib import Path

import numpy as np
import torch
import xxhash

from dataset import Loader
from dataset.batch import PairBatch
from dataset.loader import PairRows, Rows, fitting
from training.config import Config
from training.engines.contract import Engine
from training.objectives import answer_logps

VERSION = 1  # raise it when the same model and pairs give other numbers, so that old caches are left alone


def fill_reference(rows: Rows, engine: Engine, config: Config, start_hash: str) -> None:
    """Log-probabilities of every answer under the model as it stands: the starting model, of weights with this hash.

    All ranks share the work. The cache is keyed by the model (weights and config), the data, the precision (in which
    engines differ where it is not float32) and the version of this code.
    """
    assert isinstance(rows, PairRows)
    precision = "float32" if engine.dtype == torch.float32 else f"{engine.dtype} {engine.name}"
    shape = json.dumps(engine.model.config.to_hf(), sort_keys=True)  # equal weights turn by other angles elsewhere
    made_of = f"{VERSION} {start_hash} {shape} {rows.encoded.fingerprint} {precision}"
    key = xxhash.xxh3_64_hexdigest(made_of.encode())
    path = Path(config.cache_dir) / f"reference-{key}.pt"
    cached = torch.load(path, weights_only=True).numpy() if path.is_file() else None
    if all(engine.gather(cached is not None)) and cached is not None:
        rows.reference = cached
        return
    rows.reference = compute_reference(rows, engine, config.batch_size)
    if engine.world.rank == 0:
        # a name of its own: another run may be writing the same file
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        torch.save(torch.from_numpy(rows.reference), part)
        os.replace(part, path)


def compute_reference(rows: PairRows, engine: Engine, batch_size: int) -> np.ndarray:
    """float32 (pairs, 2) on every rank, each having asked about its share of the rows."""
    world = engine.world
    asking = copy.copy(rows)  # its batches need a reference of their own, which nobody looks at
    asking.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)
    batch_size = fitting(batch_size, len(rows), world.data_size)
    loader = Loader(asking, batch_size, rank=world.data_rank, world_size=world.data_size, shuffle=False)
    logps = torch.zeros(rows.n_pairs, 2, dtype=torch.float64)
    for position in range(0, len(rows), loader.rows_per_update):
        for batch in loader.update(position):
            assert isinstance(batch, PairBatch)
            batch = batch.to(engine.device)
            logps[batch.pair_ids] = answer_logps(engine.per_place(batch), batch).cpu().double()  # MPS: no float64
    total = engine.sum_over_ranks((logps / world.model_size).flatten().tolist())
    return torch.tensor(total).view_as(logps).float().numpy()
