"""The best model so far by a metric of the held-out rows, and how many validations ago that was.

    best.see(record)     after a validation, on every rank: a better model is written to out/RUN/best
    best.over            whether --patience validations in a row brought no gain

out/RUN/best is a Hugging Face model folder; beside the weights, best.json says {"metric": "val_loss", "step": 400,
"value": 2.31}. What a resumed run has to know stands in its checkpoints, in `Progress`.
"""

import math
import os
import shutil
from functools import partial
from typing import Any

from torch import Tensor

from dataset.tokenizer import TextTokenizer
from model.files import write_json
from training.checkpoint import attempt
from training.config import BEST, Config
from training.engines.contract import Engine
from training.metrics import Record, held_out_name
from training.objectives import Objective
from training.saver import Progress, Say, export_model

HIGHER_IS_BETTER = {"loss": False, "bpb": False, "accuracy": True, "margin": True}
"""By the last word of a metric's name. Of the others more is neither better nor worse."""
BY_WHOLE_NAME = {"val_reward": True, "pass_at_1": True, "pass_at_8": True}


def higher_is_better(metric: str) -> bool | None:
    """None where more is neither."""
    return BY_WHOLE_NAME.get(metric, HIGHER_IS_BETTER.get(metric.rpartition("_")[2]))


def check_keep_best(config: Config, objective: Objective[Any], held_out: bool) -> None:
    """Raise ValueError where the objective does not measure config.keep_best, or there are no held-out rows."""
    if config.keep_best is None:
        return
    measured = objective.metrics(dict.fromkeys(objective.names, 1.0), 1.0)
    usable = [name for name in map(held_out_name, measured) if higher_is_better(name) is not None]
    if config.keep_best not in usable:
        raise ValueError(
            f"--keep_best is {config.keep_best!r}; {config.stage} can keep the best model by {', '.join(usable)}"
        )
    if not held_out:
        raise ValueError(
            f"--keep_best {config.keep_best} needs held-out rows, and this data has none; "
            "give --val_path FILES or a larger --val_fraction, or leave --keep_best out"
        )


class Best:
    """Keeps the best model of one run. Every rank calls `see` at the same time."""

    def __init__(self, engine: Engine, config: Config, tokenizer: TextTokenizer, progress: Progress, say: Say):
        """`progress` knows the best so far; one by another metric does not count."""
        self.engine, self.config, self.tokenizer, self.progress, self.say = engine, config, tokenizer, progress, say
        self.folder = config.run_dir / BEST

    @property
    def over(self) -> bool:
        return self.kept and 0 < self.config.patience <= self.progress.waited

    @property
    def kept(self) -> bool:
        return self.config.keep_best is not None and self.progress.best_metric == self.config.keep_best

    def __str__(self) -> str:
        return f"{self.config.keep_best} {self.progress.best_value:.4f} of step {self.progress.best_step}"

    def see(self, record: Record) -> None:
        """Take in the record of a validation. A model that cannot be written is told, and training goes on."""
        metric, progress = self.config.keep_best, self.progress
        if metric is None:
            return
        # rank 0 decides for all, so that none waits in vain for the others
        value = self.engine.gather(record.get(metric, math.nan))[0]
        if not self.is_gain(value):
            progress.waited += 1
            return
        progress.waited = 0
        found = {"metric": metric, "step": record["step"], "value": value}
        weights = self.engine.weights()
        problem = attempt(partial(self.write, weights, found)) if self.engine.world.rank == 0 else None
        problem = self.engine.gather(problem)[0]
        if problem is not None:
            self.say(f"warning: the best model so far could not be written to {self.folder}: {problem}")
            return
        progress.best_metric, progress.best_step, progress.best_value = metric, record["step"], value
        self.say(f"{self} is the best so far: kept in {self.folder}")

    def is_gain(self, value: float) -> bool:
        assert self.config.keep_best is not None
        if not self.kept or not math.isfinite(value):
            return math.isfinite(value)
        higher = higher_is_better(self.config.keep_best)
        return value > self.progress.best_value if higher else value < self.progress.best_value

    def write(self, weights: dict[str, Tensor], found: Record) -> None:
        """Beside the one before, then in its place: a kill leaves no folder whose parts are of two models."""
        part = self.folder.with_name(f".{BEST}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            export_model(self.engine.model, weights, self.tokenizer, part)
            write_json(part / "best.json", found)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(part, self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
