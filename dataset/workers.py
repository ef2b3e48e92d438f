"""One function over many items in processes of its own, results in the order of the items.

    in_order(encoder, chunks, workers=8)     -> encoder(chunk) of every chunk, the first one's first

A process is a fresh Python that gets the function, then one item at a time, as pickles. Unlike one of
multiprocessing it imports nothing of the script that wants it, never hears Ctrl-C, and ends by itself where that
script ends.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Results of all items, in their order, with an item at most in each worker's hands.

    An exception of `work` comes where its result would. Raises ChildProcessError for a worker that is gone.
    """
    crew: list[subprocess.Popen[bytes]] = []
    items = iter(items)
    try:
        crew += [start_worker() for _ in range(workers)]
        for worker in crew:
            send(worker, work)
        busy = [worker for worker, item in zip(crew, islice(items, workers), strict=False) if send(worker, item)]
        while busy:
            worker = busy.pop(0)  # whoever has the oldest item
            yield receive(worker)
            busy += [worker for item in islice(items, 1) if send(worker, item)]
    finally:
        for worker in crew:
            worker.kill()
            worker.communicate()


def start_worker() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", "from dataset.workers import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        # Ctrl-C goes to all processes of a terminal's group
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def send(worker: subprocess.Popen[bytes], what: object) -> bool:
    assert worker.stdin is not None
    try:
        pickle.dump(what, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
    except BrokenPipeError:
        raise gone(worker) from None
    return True


def receive(worker: subprocess.Popen[bytes]) -> Any:  # what the function that it was sent gives
    assert worker.stdout is not None
    try:
        good, result = pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise gone(worker) from None
    if not good:
        raise result
    return result


def gone(worker: subprocess.Popen[bytes]) -> ChildProcessError:
    return ChildProcessError(
        f"a process that prepared data ended with status {worker.wait()}, perhaps killed for want of memory; "
        "the same command begins the preparation again"
    )


def serve() -> None:
    """A worker's whole life; it ends where there are no more orders."""
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    try:
        work = pickle.load(orders)
        while True:
            item = pickle.load(orders)
            try:
                answer = (True, work(item))
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = (False, error)
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)
