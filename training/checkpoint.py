"""State of a run to a folder and back; a kill, a full disk or a flipped bit costs at most the newest one.

    checkpoints/step_000200/state/      weights and optimizer, float32 (torch.distributed.checkpoint)
                            rng_0.pt    random state of rank 0
                            run.json    step, position in the data, the settings that must not change
                            COMPLETE    written last: the hash of every file above

A checkpoint is written under another name beside, flushed, renamed, and only then marked COMPLETE. `find` checks the
hashes, says aloud what is damaged, and falls back to the one before.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from training.engines.single import SingleEngine

COMPLETE = "COMPLETE"


def save(engine: SingleEngine, folder: Path, run: dict[str, Any], keep_last: int) -> str | None:
    """Write folder (checkpoints/step_N) from all ranks. Returns None, or why it could not be written, on every rank.

    After a failure nothing is left of the new checkpoint and the earlier ones stand.
    """
    part = folder.with_name(f".{folder.name}.part")
    first = engine.world.rank == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
    engine.barrier()
    problem = attempt(lambda: write_state(engine, part, run))
    problem = next(filter(None, engine.gather(problem)), None)
    if problem is None and first:
        problem = attempt(lambda: finish(part, folder))
    if first and problem is not None:
        shutil.rmtree(part, ignore_errors=True)
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    problem = engine.gather(problem)[0]
    if problem is None and first:
        for old in stale(folder, keep_last):
            shutil.rmtree(old, ignore_errors=True)
    return problem


def attempt(write: Callable[[], None]) -> str | None:
    """What went wrong in one line, None where nothing did."""
    try:
        write()
    except (Exception, CheckpointException) as error:
        reason = f"{type(error).__name__}: {error}"
        # torch's zip writer reports a full disk as a position it did not reach
        if any(sign in reason for sign in ("No space left", "file write failed", "unexpected pos")):
            return "No space left on device"
        return reason.strip().splitlines()[0]
    return None


def write_state(engine: SingleEngine, part: Path, run: dict[str, Any]) -> None:
    part.mkdir(parents=True, exist_ok=True)
    engine.save(part / "state")
    torch.save(rng_state(), part / f"rng_{engine.world.rank}.pt")
    if engine.world.rank == 0:
        (part / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")


def finish(part: Path, folder: Path) -> None:
    """Hash and flush every file, rename, mark complete."""
    hashes = {}
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        with open(path, "r+b") as file:
            hashes[str(path.relative_to(part))] = file_hash(path)
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    mark = folder / f"{COMPLETE}.part"
    with open(mark, "w", encoding="utf-8") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(mark, folder / COMPLETE)


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]  # its stub lacks buffers


def step_of(folder: Path) -> int:
    """step_000200 -> 200."""
    return int(folder.name.removeprefix("step_"))


def by_step(checkpoints: Path) -> list[Path]:
    """All checkpoints, whole or not, the oldest first; folders that a user named otherwise are not ours."""
    return sorted((path for path in checkpoints.glob("step_*") if path.name[5:].isdecimal()), key=step_of)


def stale(folder: Path, keep_last: int) -> list[Path]:
    """Checkpoints to remove once `folder` is written: older ones beyond keep_last, and those of later steps, which a
    run that was resumed from an earlier checkpoint (or found them damaged) has left behind."""
    others = by_step(folder.parent)
    upto = [path for path in others if step_of(path) <= step_of(folder) and (path / COMPLETE).is_file()]
    return upto[:-keep_last] + [path for path in others if step_of(path) > step_of(folder)]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file is as it was written."""
    try:
        hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it was not written to its end (no COMPLETE)"
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_hash(folder / name) != expected:
            return f"{name} is damaged (its hash differs from the one written)"
    return None


def find(resume: str, checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest whole one for "auto" (None where there is none), or the named folder.

    Raises FileNotFoundError or ValueError for a named folder that is not there or is damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        if not Path(resume).is_dir():
            raise FileNotFoundError(
                f"--resume {resume}: no such folder; give a checkpoint (.../checkpoints/step_000200), auto or none"
            )
        if problem := damage(Path(resume)):
            raise ValueError(f"--resume {resume}: {problem}; use --resume auto for the newest whole one")
        return Path(resume)
    for folder in reversed(by_step(checkpoints)):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"checkpoint {folder.name} is not used: {problem}; trying the one before")
    return None


def load(engine: SingleEngine, folder: Path) -> dict[str, Any]:
    """Put weights, optimizer and random state back; returns run.json."""
    engine.load(folder / "state")
    mine = folder / f"rng_{engine.world.rank}.pt"
    if mine.is_file():  # a rank that was not there before keeps its fresh seed
        set_rng_state(torch.load(mine, weights_only=True))
    return read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
