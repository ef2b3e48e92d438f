"""DPO's reference: what the frozen starting model thinks of every answer, computed once and cached.

    prepare_reference(loader, objective, engine, config, start_hash)    where the loss has one, and nothing where not
    fill_reference(loader, engine, config, start_hash)    loader.rows.reference = float32 (pairs, 2), nats

It is two more columns of the batch, chosen and rejected, so that the loss is a pure function of tensors and no second
model is held. Pairs that the run does not come to are left out (they are not a number) until another run does.
"""

import contextlib
import copy
import json
import os
import secrets
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from dataset import Loader
from dataset.batch import PairBatch
from dataset.loader import EMPTY_ROW, ENDLESS, PairRows, fitting
from dataset.progress import Progress
from model.adapter_folder import is_adapter
from model.adapters import switched_off
from training import checkpoint
from training.config import Config
from training.engines.contract import Engine
from training.objectives import DPO, answer_logps

VERSION = 2  # raise it when the same model and pairs give other numbers, so that old caches are left alone
LARGER = 4  # times the rows of training are asked about at once: no gradient takes memory


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

    All ranks share the work. The cache is keyed by the model (weights and config), the data, the precision (in which
    engines differ where it is not float32) and the version of this code.
    """
    rows = loader.rows
    assert isinstance(rows, PairRows)
    precision = "float32" if engine.dtype == torch.float32 else f"{engine.dtype} {engine.name}"
    shape = json.dumps(engine.model.config.to_hf(), sort_keys=True)  # equal weights turn by other angles elsewhere
    made_of = f"{VERSION} {start_hash} {shape} {rows.encoded.fingerprint} {precision}"
    path = Path(config.cache_dir) / f"reference-{xxhash.xxh3_64_hexdigest(made_of.encode())}.pt"
    known = np.full((rows.n_pairs, 2), np.nan, dtype=np.float32)
    # every rank reads its own copy; where one has none, none is used, so that all have the same work left
    if all(engine.gather(path.is_file())):
        known = torch.load(path, weights_only=True).numpy()
    row_of_pair = np.repeat(np.arange(len(rows)), np.diff(rows.packing.offsets))
    unknown = np.isnan(known[rows.packing.document]).any(1)
    wanted = rows_to_ask(loader, engine, config, row_of_pair[unknown])
    rows.reference = known
    if not wanted:
        return
    batch_size = fitting(LARGER * config.batch_size, len(wanted), engine.world.data_size)
    goes_on = is_adapter(config.init_from or "none")
    with contextlib.nullcontext() if goes_on else switched_off(engine.model):
        compute_reference(rows, wanted, engine, batch_size)
    if engine.world.rank == 0:
        write(torch.from_numpy(rows.reference), path)


def rows_to_ask(loader: Loader, engine: Engine, config: Config, unknown: np.ndarray) -> list[int]:
    """Numbers of the rows, ascending, that a run will see and that are among those `unknown` to any rank."""
    seen = loader.rows_before(max(engine.gather(last_position(loader, config))))
    missing = np.intersect1d(seen, unknown).tolist()
    return sorted(set().union(*engine.gather(missing)))  # caches of nodes may differ


def write(content: Tensor | tuple[Tensor, ...], path: Path) -> None:
    """Whole or not at all."""
    # a name of its own: another run may be writing the same file
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    torch.save(content, part)
    os.replace(part, path)


def last_position(loader: Loader, config: Config) -> int:
    """The position at which a run ends, whichever of its checkpoints it goes on from: another number of ranks may have
    made its updates larger before."""
    if loader.total_rows < ENDLESS:
        return loader.total_rows
    if config.resume not in ("auto", "none"):
        return ENDLESS  # from a checkpoint that may be any run's
    folders = checkpoint.by_step(config.run_dir / "checkpoints")
    saved = [checkpoint.read_run(folder)["progress"] for folder in folders if (folder / "run.json").is_file()]
    starts = [(0, 0), *((progress["step"], progress["position"]) for progress in saved)]
    return max(position + max(0, config.max_steps - step) * loader.rows_per_update for step, position in starts)


def compute_reference(rows: PairRows, wanted: list[int], engine: Engine, batch_size: int) -> None:
    """Fill in the reference of the pairs in these rows, on every rank, each having asked about its share."""
    world = engine.world
    pairs = rows.pairs_of(wanted)
    logps = torch.zeros(rows.n_pairs, 2, dtype=torch.float64)
    together = batch_size * world.data_size
    asking = copy.copy(rows)  # its batches need a reference, which nobody looks at
    asking.reference = np.zeros((rows.n_pairs, 2), dtype=np.float32)
    with Progress("reference", len(pairs), show=world.rank == 0, unit="pairs") as progress:
        for first in range(0, len(wanted), together):
            now = wanted[first : first + together]
            mine = now[world.data_rank * batch_size :][:batch_size]
            batch = asking.collate(mine + [EMPTY_ROW] * (batch_size - len(mine))).to(engine.device)
            assert isinstance(batch, PairBatch)
            logps[batch.pair_ids] = answer_logps(engine.per_place(batch), batch).cpu().double()  # MPS: no float64
            progress.update(len(rows.pairs_of(now)))
    total = engine.sum_over_ranks((logps / world.model_size).flatten().tolist())
    assert rows.reference is not None
    rows.reference[pairs] = torch.tensor(total).view_as(logps).float().numpy()[pairs]
