"""Bits per byte of held-out text against seconds of training: our recipe, or another one in our loop, one shape.

python scripts/contest.py ours     --data_path 'data/*.jsonl' --dim 256 --max_steps 4000 --run_name ours_256
python scripts/contest.py minimind --data_path 'data/*.jsonl' --dim 256 --max_steps 4000 --run_name minimind_256
python scripts/plot_runs.py out/ours_256 out/minimind_256 --along seconds --metrics bpb

The flags are those of pretraining, and so is the run's folder. Seconds in its metrics.jsonl are of training alone. Both
are asked about the same held-out rows of ROW tokens, the shorter of the two recipes' rows. Give each the batch, and
--max_steps the number of updates, that its time is for.

minimind    AdamW at 5e-4 with betas 0.9 and 0.999 and a decay of 0.01 of every parameter, clipping at 1, a cosine to a
            tenth without warm-up; every document a row of its own, cut to ROW tokens and padded
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.optim import Optimizer

from dataset.loader import TextRows
from dataset.pack import Packing
from training import NextToken, PretrainConfig, build_engine, run_stage, train
from training.setup import load_data, run_identity, start_machine, starting_model

ROW = 340  # tokens


def a_document_a_row(rows: TextRows) -> None:
    """Change the rows: every document has one, from its first token on, and what is beyond it is not learnt."""
    length = np.minimum(rows.ids.lengths() - 1, ROW)
    document = np.flatnonzero(length > 0)
    rows.packing = Packing(
        np.arange(len(document) + 1), document, np.zeros(len(document), dtype=np.int64), length[document], ROW
    )
    rows.most_pieces = 1


def decay_everything(optimizers: list[Optimizer], decay: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = decay


class Recipe(NamedTuple):
    flags: str = ""
    rows: Callable[[TextRows], None] | None = None  # what becomes of them
    decay: Callable[[list[Optimizer], float], None] | None = None  # what becomes of the optimizers


RECIPES = {
    "ours": Recipe(),
    "minimind": Recipe(
        "--optimizer adamw --learning_rate 5e-4 --beta2 0.999 --weight_decay 0.01 --warmup_steps 0",
        a_document_a_row,
        decay_everything,
    ),
}


def main(name: str, asked: PretrainConfig) -> None:
    """As train_pretrain.py does it, but for the rows and, in other recipes, what decays."""
    if not asked.max_steps:
        raise ValueError("a pass is not as many rows in one recipe as in another; give --max_steps")
    machine = start_machine(asked)
    start = starting_model(asked)
    data = load_data(start, machine)
    if data.val is None:
        raise ValueError("there is nothing to compare by: no row is held out; give --val_fraction or --val_path")
    held_out = TextRows(data.val.rows.encoded, ROW, start.tokenizer.pad_id)
    data.val = replace(data.val, rows=held_out, total_rows=len(held_out))
    assert isinstance(data.train.rows, TextRows)
    recipe = RECIPES[name]
    if recipe.rows:
        recipe.rows(data.train.rows)
    engine = build_engine(start.model, start.config, machine, start.weights)
    if recipe.decay:
        recipe.decay(engine.optimizers, start.config.weight_decay)
    objective = NextToken(torch.from_numpy(start.tokenizer.token_bytes))
    train(engine, objective, data.train, data.val, start, run_identity(start, data) | {"recipe": name})


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        sys.exit(f"which recipe? {' or '.join(RECIPES)}, then the flags of pretraining; --help tells more behind it")
    name = sys.argv.pop(1)
    sys.argv[1:1] = RECIPES[name].flags.split()
    run_stage(partial(main, name), PretrainConfig, about=__doc__)
