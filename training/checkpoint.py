"""State of a run to a folder and back; a kill, a full disk or a flipped bit costs at most the newest one.

    checkpoints/step_000200/state/      weights and optimizer, float32, every rank's part in files of its own
                            rng_0.pt    random state of rank 0, and of those that draw what it draws
                            run.json    step, position in the data, the settings that must not change
                            COMPLETE    written last: the hash of every file above

A checkpoint is written under another name beside, flushed, renamed, and only then marked COMPLETE. `find` checks the
hashes, says aloud what is damaged, and falls back to the one before. The work of `Saving` is done in the background
where asked, and only then published, so that training waits for a copy in memory and not for the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from training.distributed import World
from training.engines.contract import Engine

COMPLETE = "COMPLETE"
Hashes = dict[str, str]  # of files, by their path in the checkpoint


class Saving:
    """One checkpoint on its way to the disk, from all ranks side by side.

    Begun by all ranks at once; `published` takes it one step further whenever all ranks have done their part of the
    step before (first writing, then hashing what was written), and must be called by all ranks at once too.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        run: dict[str, Any],
        keep_last: int,
        background: bool = False,
        also: Callable[[], None] | None = None,
    ):
        """`also` is written by this rank beside its part of the state; `background`: return when all is copied."""
        self.engine, self.folder, self.keep_last = engine, folder, keep_last
        self.part = folder.with_name(f".{folder.name}.part")
        self.problem: str | None = None
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.hashes: Hashes = {}
        first = engine.world.rank == 0
        if first:
            shutil.rmtree(self.part, ignore_errors=True)
        engine.barrier()
        # a rank that cannot even make the folder must not leave the others waiting for it in the engine's save
        problem = attempt(lambda: self.part.mkdir(parents=True, exist_ok=True))
        problem = first_of_all(engine, problem)
        rng = rng_state()
        started: list[Future | None] = []
        if problem is None:
            problem = attempt(lambda: started.append(engine.save(self.part / "state", background)))

        def write() -> None:
            if started[0] is not None:
                started[0].result()
            if engine.world.tensor_rank == 0:
                torch.save(rng, random_file(self.part, engine.world))
            if first:
                (self.part / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
            if also is not None:
                also()

        self.steps: list[Callable[[], None]] = [write, self.hash_my_share]
        self.work = (
            self.pool.submit(attempt, self.steps.pop(0)) if problem is None else self.pool.submit(lambda: problem)
        )

    def hash_my_share(self) -> None:
        """Hash and flush every nth file."""
        rank, size = self.engine.world.rank, self.engine.world.size
        files = sorted(path for path in self.part.rglob("*") if path.is_file())
        for path in files[rank::size]:
            with open(path, "r+b") as file:
                self.hashes[str(path.relative_to(self.part))] = file_hash(path)
                os.fsync(file.fileno())

    def done(self) -> bool:
        """Whether this rank has done its part of the current step."""
        return self.work.done()

    def published(self) -> bool:
        """Go a step further; True when nothing is left to do. `problem` then says, on every rank, what went wrong.

        After a failure nothing is left of the new checkpoint and the earlier ones stand.
        """
        self.problem = first_of_all(self.engine, self.work.result())
        if self.problem is None and self.steps:
            self.work = self.pool.submit(attempt, self.steps.pop(0))
            return False
        shares = self.engine.gather(self.hashes)
        if self.engine.world.rank == 0:
            if self.problem is None:
                hashes = {name: value for share in shares for name, value in share.items()}
                self.problem = attempt(lambda: publish(self.part, self.folder, hashes))
            if self.problem is None:
                for old in stale(self.folder, self.keep_last):
                    shutil.rmtree(old, ignore_errors=True)
            else:
                shutil.rmtree(self.part, ignore_errors=True)
                if not (self.folder / COMPLETE).is_file():
                    shutil.rmtree(self.folder, ignore_errors=True)
        self.problem = self.engine.gather(self.problem)[0]
        self.pool.shutdown()
        return True


def first_of_all(engine: Engine, problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank."""
    return next(filter(None, engine.gather(problem)), None)


def attempt(write: Callable[[], None]) -> str | None:
    """What went wrong in one line, None where nothing did."""
    try:
        write()
    except (Exception, CheckpointException) as error:
        reason = named(error)
        # torch's zip writer reports a full disk as a position it did not reach
        if any(sign in reason for sign in ("No space left", "file write failed", "unexpected pos")):
            return "No space left on device"
        return reason.strip().splitlines()[0]
    return None


def named(error: BaseException) -> str:
    """An error by its kind and message; the first of several ranks' where torch has put them into one."""
    while isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}"


def publish(part: Path, folder: Path, hashes: Hashes) -> None:
    """Rename, then mark complete."""
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
    """What is wrong with a checkpoint, None where every file is as it was written.

    Raises ValueError for files that cannot be read, which is no damage: a disk or a network may be back in a minute.
    """
    try:
        return difference(folder)
    except OSError as error:
        raise ValueError(
            f"checkpoint {folder} could not be read ({error}); it is left as it is. Once it can be read, run the same "
            "command again"
        ) from error


def difference(folder: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written. Raises OSError where one cannot be read."""
    try:
        hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "it was not written to its end (no COMPLETE)"
    for name, expected in hashes.items():
        try:
            found = file_hash(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != expected:
            return f"{name} is damaged (its hash differs from the one written)"
    return None


def find(resume: str, checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest whole one for "auto" (None where there is none), or the named folder.

    Raises FileNotFoundError for a named folder that is not there, and ValueError for one that is damaged, where there
    are checkpoints but none is whole, and where one cannot be read.
    """
    if resume == "none":
        return None
    if resume != "auto":
        if not Path(resume).is_dir():
            raise FileNotFoundError(
                f"--resume {resume}: no such folder; give a checkpoint (.../checkpoints/step_000200), auto or none"
            )
        if owner := foreign_owner(Path(resume)):
            raise ValueError(
                f"--resume {resume} belongs to {owner}, and reading a checkpoint can run code that is hidden in it; if "
                "you trust where it comes from, make it yours with `cp -r` and give the copy"
            )
        if problem := damage(Path(resume)):
            raise ValueError(f"--resume {resume}: {problem}; use --resume auto for the newest whole one")
        return Path(resume)
    problems: list[str] = []
    for folder in reversed(by_step(checkpoints)):
        problem = damage(folder)
        if problem is None:
            for told in problems:
                say(f"checkpoint {told}; trying the one before")
            return folder
        problems.append(f"{folder.name} is not used: {problem}")
    if problems:
        raise ValueError(
            f"{checkpoints}: none of the {len(problems)} checkpoints is whole; the newest, {problems[0]}. Nothing was "
            "changed: repair it or put back a copy, or start over with --resume none, which moves them to a backup"
        )
    return None


def foreign_owner(folder: Path) -> str | None:
    """The owner of the first file in a folder that is neither this user's nor the system's. Root reads all there is:
    in a container it owns little of what it is given. None also where files have no owners (Windows)."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return None
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.stat().st_uid not in (os.geteuid(), 0):
            return f"user {path.stat().st_uid}"
    return None


def share_folder(engine: Engine, folder: Path) -> None:
    """Make a run's folder, and make sure that every node sees the same one. Raises ValueError where one does not."""
    folder.mkdir(parents=True, exist_ok=True)
    if engine.world.size == engine.world.local_size:
        return
    mark = folder / f".shared-{os.getpid()}"
    mark = engine.gather(mark)[0]
    if engine.world.rank == 0:
        mark.touch()
    engine.barrier()
    seen = engine.gather(mark.is_file())
    if engine.world.rank == 0:
        mark.unlink()
    if not all(seen):
        raise ValueError(
            f"rank {seen.index(False)} does not see rank 0's {folder.absolute()}; every node writes its part of a "
            "checkpoint, so --out_dir must be on a disk that all share"
        )


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Put weights, optimizer and random state back; returns run.json."""
    engine.load(folder / "state")
    mine = random_file(folder, engine.world)
    if mine.is_file():  # a rank that was not there before keeps its fresh seed
        set_rng_state(torch.load(mine, weights_only=True))
    return read_run(folder)


def random_file(folder: Path, world: World) -> Path:
    return folder / f"rng_{world.random_rank}.pt"


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
