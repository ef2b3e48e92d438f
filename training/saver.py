"""How a run begins, is saved on its way, and leaves a model folder: checkpoints seen from the loop.

    progress = resume(engine, config, identity, spread, say)     Progress(step=200, position=3200, ...), or a fresh one
    saver.save(progress, last=False)                             begins a checkpoint and the model folder
    saver.advance()                                              takes one in the background a step further

What must be equal for a run to go on exactly (`identity`) is refused by name where it differs; what may differ is
noted. Which flag is which stands beside the flag (training/config.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from dataset.tokenizer import TextTokenizer
from model import GPT, save_pretrained
from training import checkpoint
from training.config import Config, rules
from training.engines.contract import Engine

Settings = dict[str, object]
Say = Callable[[str], None]


@dataclass
class Progress:
    """Where a run stands; saved in run.json."""

    step: int = 0
    position: int = 0  # rows seen, over all ranks and epochs
    tokens: int = 0  # supervised tokens seen
    seconds: float = 0.0  # spent training, over all resumed parts
    # of the model kept by --keep_best; the metric is None while there is none
    best_metric: str | None = None
    best_step: int = 0
    best_value: float = 0.0
    waited: int = 0  # validations without a gain since then


def noted(config: Config, engine: Engine, rows_per_update: int) -> Settings:
    """What is worth a note where it differs at a resume."""
    flags: Settings = {name: getattr(config, name) for name, rule in rules(config).items() if rule.resume == "note"}
    return flags | {"engine": engine.name, "processes": engine.world.size, "rows an update": rows_per_update}


def resume(engine: Engine, config: Config, identity: Settings, settings: Settings, say: Say) -> Progress:
    """Load the checkpoint config.resume asks for, after checking that it continues this very run; rank 0 says so.

    Raises ValueError for a checkpoint of another identity.
    """
    folder, first = config.run_dir / "checkpoints", engine.world.rank == 0
    if first:
        for half_written in folder.glob(".step_*.part"):
            shutil.rmtree(half_written)
    found = checkpoint.find(config.resume, folder, say) if first else None
    found = engine.gather(found)[0]
    if found is None:
        if first and (old := checkpoint.by_step(folder)):
            say(f"starting over: the {len(old)} checkpoints in {folder} are removed")
            for path in old:
                shutil.rmtree(path)
        return Progress()
    saved = checkpoint.read_run(found)
    before = saved["identity"] | saved["identity"].get("shape", {})  # older versions keep shapes apart
    for name, value in identity.items():
        # a name that an older version did not save cannot have been chosen then
        if before.get(name, value) != value:
            raise ValueError(
                f"{found} was made with {name} {before[name]!r}, this run has {value!r}, so it cannot continue it "
                f"exactly; use the old {name}, another --out_dir, or start over with --resume none"
            )
    checkpoint.load(engine, found)
    if not first:
        return Progress(**saved["progress"])
    for name, now in settings.items():
        if (then := saved["config"].get(name, now)) != now:
            say(f"note: {name} was {then!r} when this checkpoint was saved and is {now!r} now")
    say(f"resumed from {found}")
    return Progress(**saved["progress"])


class Saver:
    """Writes checkpoints and the model folder. Every rank calls every method at the same time."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        tokenizer: TextTokenizer,
        identity: Settings,
        settings: Settings,
        progress: Progress,
        total_steps: int,
        say: Say,
    ):
        """`progress` is where the run stands as it begins, which is saved already unless it is the very start."""
        self.engine, self.config, self.tokenizer, self.say = engine, config, tokenizer, say
        self.kept = {"identity": identity, "config": settings}
        self.total_steps = total_steps
        self.saved_step = progress.step or -1
        self.saving: checkpoint.Saving | None = None

    def save(self, progress: Progress, last: bool = True) -> None:
        """Checkpoint and model folder. One that cannot be written is told loudly; at the end it is an error.

        With config.async_save only the last one is waited for.
        """
        self.finish()
        if self.saved_step == progress.step:
            return
        folder = self.config.run_dir / "checkpoints" / f"step_{progress.step:06d}"
        background = self.config.async_save and not last
        self.saving = checkpoint.Saving(
            self.engine,
            folder,
            {"progress": asdict(progress)} | self.kept,
            self.config.keep_last,
            background,
            also=self.export(background),
        )
        if not background:
            self.finish()

    def written(self) -> bool:
        """Whether this rank has done its part of a save under way; once all have, `advance` is due."""
        return self.saving is not None and self.saving.done()

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one."""
        while self.saving is not None:
            self.advance()

    def advance(self) -> None:
        """Take the checkpoint under way a step further, and say if it failed."""
        assert self.saving is not None
        if not self.saving.published():
            return
        saving, self.saving = self.saving, None
        step = checkpoint.step_of(saving.folder)
        if saving.problem is None:
            self.saved_step = step
            return
        message = (
            f"step {step} could not be saved in {self.config.run_dir}: {saving.problem}; "
            "earlier checkpoints are untouched. Free some space"
        )
        if step >= self.total_steps:
            raise ValueError(f"{message} and run the same command again")
        self.say(f"warning: {message}; training goes on and saves again in {self.config.save_interval} steps")

    def export(self, background: bool) -> Callable[[], None] | None:
        """What writes the Hugging Face model folder: on rank 0, of the weights as they are now."""
        weights = self.engine.weights()
        if self.engine.world.rank != 0:
            return None
        if background:
            weights = {name: tensor.clone() for name, tensor in weights.items()}
        return partial(export_model, self.engine.model, weights, self.tokenizer, self.config.run_dir)


def export_model(model: GPT, weights: dict[str, torch.Tensor], tokenizer: TextTokenizer, folder: Path) -> None:
    save_pretrained(
        model,
        folder,
        weights=weights,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
    )
    tokenizer.save(folder)
