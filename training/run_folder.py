"""A run's folder has one writer at a time, and is moved aside rather than emptied.

with held(engine, Path("out/pretrain_512"), patience=0, say=print):     else: in use by process 4711 on node3
    move_aside(Path("out/pretrain_512"))                                Path("out/pretrain_512.1")
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from training.engines.contract import Peers

LOCK = ".lock"
HOLDER = ".lock.holder"  # beside it, since one who tries to take a lock may empty the lock's own file
OFFLOAD = "offload"  # what this very start keeps there (--offload nvme)


@contextlib.contextmanager
def held(peers: Peers, folder: Path, patience: float, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out of a folder that is there, until the end of this block or of rank 0's process.

    Raises ValueError on every rank where another run holds it, after `patience` seconds of waiting for it. On a shared
    disk this reaches as far as its locks do (flock; over NFS since version 4, or with lockd).
    """
    lock = FileLock(folder / LOCK)
    problem = take(lock, folder, patience, say) if peers.world.rank == 0 else None
    try:
        if problem := peers.gather(problem)[0]:
            raise ValueError(problem)
        yield
    finally:
        if lock.is_locked:
            (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def take(lock: FileLock, folder: Path, patience: float, say: Callable[[str], None]) -> str | None:
    """Who has the lock, where it cannot be had, as one line that says what to do."""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if patience:
                say(f"waiting up to {patience:.0f} s: {folder} is in use by {holder(folder)}")
            lock.acquire(timeout=patience)
    except Timeout:
        return (
            f"{folder} is in use by another run ({holder(folder)}); wait for it, stop it, or give another --out_dir. "
            f"If no such process is there any more, remove {folder / LOCK}"
        )
    except (OSError, NotImplementedError) as error:
        say(f"note: {folder} cannot be locked ({error}); see to it that no other run writes there")
        return None
    with contextlib.suppress(OSError):  # a full disk
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}", encoding="utf-8")
    return None


def holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8") or "an unknown process"
    except OSError:
        return "an unknown process"


def move_aside(folder: Path) -> Path | None:
    """Move all that earlier runs left in a folder to the first free of folder.1, folder.2, ...; None for nothing."""
    left = [path for path in folder.glob("*") if path.name not in (LOCK, HOLDER, OFFLOAD)]
    if not left:
        return None
    number = 1
    while (backup := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    backup.mkdir()
    for path in left:
        shutil.move(path, backup / path.name)
    return backup
