"""How a run begins, is saved on its way, and leaves a model folder: checkpoints seen from the loop.

    progress = resume(engine, config, identity, spread, say)     Progress(step=200, position=3200, ...), or a fresh one
    saver.save(progress, last=False)                             begins a checkpoint and the model folder
    saver.advance()                                              takes one in the background a step further

What must be equal for a run to go on exactly (`identity`) is refused by name where it differs; what may differ is
noted. Which flag is which stands beside the flag (training/config.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataset.records import expand_paths
from dataset.tokenizer import TextTokenizer
from model import GPT, adapter_folder, save_pretrained
from training import checkpoint, distributed
from training.config import Config, rules
from training.engines.contract import Engine
from training.run_folder import move_aside

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
    schedule_rows: int = 0  # rows an update when the run began, by which its learning rate is scheduled
    answers: dict[str, float] = field(default_factory=dict)  # health of the starting model's, where it was looked at


def noted(config: Config, engine: Engine, rows_per_update: int) -> Settings:
    """What is worth a note where it differs at a resume."""
    flags: Settings = {name: getattr(config, name) for name, rule in rules(config).items() if rule.resume == "note"}
    return flags | {"engine": engine.name, "processes": engine.world.size, "rows an update": rows_per_update}


def resume(engine: Engine, config: Config, identity: Settings, settings: Settings, say: Say) -> Progress:
    """Load the checkpoint config.resume asks for, after checking that it continues this very run; rank 0 says so.

    Starting over is asked for once: where a launcher has started the command again, the run goes on.

    Raises ValueError for a checkpoint of another identity, and as checkpoint.find does.
    """
    folder, first = config.run_dir / "checkpoints", engine.world.rank == 0
    again = any(engine.gather(distributed.restarted()))
    asked = "auto" if config.resume == "none" and again else config.resume
    if first:
        for half_written in folder.glob(".step_*.part"):
            shutil.rmtree(half_written)
        if asked != config.resume:
            say("restarted: --resume none was for the first start, so the run goes on from its newest checkpoint")
        if asked == "none" and (backup := move_aside(config.run_dir)):
            say(f"starting over: what was in {config.run_dir} is now in {backup}")
    found = checkpoint.find(asked, folder, say) if first else None
    found = engine.gather(found)[0]
    if found is None:
        return Progress()
    saved = checkpoint.read_run(found)
    if changes := differences(saved, identity, config):
        raise ValueError(
            f"{found} cannot be continued exactly: {'; '.join(changes)}. "
            "Put back what it was made with, give another --out_dir, or start over with --resume none"
        )
    checkpoint.load(engine, found)
    # older versions did not save it apart
    progress = Progress(**{"schedule_rows": saved["config"].get("rows an update", 0)} | saved["progress"])
    if not first:
        return progress
    for name, now in settings.items():
        if (then := saved["config"].get(name, now)) != now:
            say(f"note: {name} was {then!r} when this checkpoint was saved and is {now!r} now")
    say(f"resumed from {found}")
    return progress


DATA_FLAGS = ("val_path", "val_fraction", "on_bad_row", "tokenizer")  # which rows are learnt from, and as what tokens


def origin(config: Config) -> Settings:
    """What a run is made from by name, so that a refusal can say what of it has changed."""
    return {name: getattr(config, name) for name in (*DATA_FLAGS, "init_from")}


def data_files(config: Config) -> dict[str, list[int]]:
    """Size in bytes and time of writing in nanoseconds of every training file; none for a source that reads none."""
    try:
        stats = {path: Path(path).stat() for path in expand_paths(config.data_path)}
    except OSError:
        return {}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def differences(saved: dict[str, Any], identity: Settings, config: Config) -> list[str]:
    """What keeps a run from going on exactly from a checkpoint whose run.json this is, a few words for each."""
    before, identity = {"adapter": None} | flat(saved["identity"]), flat(identity)
    # a name that an older version did not save cannot have been chosen then; it knew no adapter, so that had no flags
    changed = [name for name, value in identity.items() if before.get(name, value) != value]
    hashes = ("data", "init_from")
    found = told({name: before[name] for name in changed if name not in hashes}, identity, config)
    then, now = saved.get("origin", {}), origin(config)
    if "init_from" in changed:
        start = told({"init_from": then.get("init_from", config.init_from)}, now, config)
        found += start or [f"the model in {config.init_from} has changed"]
    if "data" in changed:
        causes = changed_files(saved.get("files", {}), data_files(config))
        causes += told({name: then[name] for name in DATA_FLAGS if name in then}, now, config)
        # the flags named before, such as max_seq_len, are a cause too
        found += causes or (
            [] if found else ["the training data has changed, or the tokenizer that makes tokens of it"]
        )
    return found


def told(before: Settings, now: Settings, config: Config) -> list[str]:
    """["--seed was 42 and is 7"]: those of `before` that are otherwise now."""
    return [
        f"{'--' if name in rules(config) else ''}{name} was {then} and is {now[name]}"
        for name, then in before.items()
        if then != now[name]
    ]


def flat(identity: dict[str, Any]) -> Settings:
    """Older versions keep shapes apart."""
    return {name: value for name, value in identity.items() if name != "shape"} | identity.get("shape", {})


def changed_files(before: dict[str, list[int]], now: dict[str, list[int]]) -> list[str]:
    if not before:  # an older version did not note them
        return []
    gone = [f"{path} is no longer among the training files" for path in before if path not in now]
    new = [f"{path} was not among the training files" for path in now if path not in before]
    return gone + new + [f"{path} has changed" for path in now if before.get(path, now[path]) != now[path]]


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
        self.kept = {"identity": identity, "config": settings, "origin": origin(config), "files": data_files(config)}
        self.total_steps = total_steps
        # not so where the checkpoint is another run's, or the model folder is gone
        here = all(
            path.is_file()
            for path in (self.folder(progress) / checkpoint.COMPLETE, config.run_dir / exported(engine.model))
        )
        self.saved_step = progress.step if engine.gather(here)[0] else -1
        self.saving: checkpoint.Saving | None = None

    def save(self, progress: Progress, last: bool = True) -> None:
        """Checkpoint and model folder. One that cannot be written is told loudly; at the end it is an error.

        With config.async_save only the last one is waited for.
        """
        self.finish()
        if self.saved_step == progress.step:
            return
        background = self.config.async_save and not last
        self.saving = checkpoint.Saving(
            self.engine,
            self.folder(progress),
            {"progress": asdict(progress)} | self.kept,
            self.config.keep_last,
            background,
            also=self.export(background),
        )
        if not background:
            self.finish()

    def folder(self, progress: Progress) -> Path:
        return self.config.run_dir / "checkpoints" / f"step_{progress.step:06d}"

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
        remedy = "Free some space" if saving.problem.startswith("No space left") else "Mend that"
        message = (
            f"step {step} could not be saved in {self.config.run_dir}: {saving.problem}; "
            f"earlier checkpoints are untouched. {remedy}"
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


def exported(model: GPT) -> str:
    """The file of the model folder that holds the weights; it stands beside the checkpoints."""
    return "model.safetensors" if model.adapter is None else adapter_folder.WEIGHTS


def export_model(model: GPT, weights: dict[str, torch.Tensor], tokenizer: TextTokenizer, folder: Path) -> None:
    if model.adapter is not None:
        adapter_folder.save_adapter(model.adapter, weights, folder)
    else:
        save_pretrained(
            model,
            folder,
            weights=weights,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
        )
    tokenizer.save(folder)
