"""A command line in, a script's main called with its config; flags are checked before anything slow is imported.

if __name__ == "__main__":
    run_stage(main, DPOConfig)
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from training.config import Config, load_config

C = TypeVar("C", bound=Config)


def run_stage(main: Callable[[C], None], cls: type[C], about: str | None = None) -> None:
    """Parse flags and call main; what a user did wrong, or the system does not allow, is one line and not a traceback.
    Exits with 2 then, and with 130 after Ctrl-C.

    about: what --help begins with, where a script is no stage but takes a stage's flags.
    """
    try:
        asked = load_config(cls, about=about)
    except (ValueError, OSError) as error:
        from dataset.records import one_line

        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    with slow_imports():
        from training.setup import run

    run(main, asked)


@contextmanager
def slow_imports() -> Iterator[None]:
    """Around the first import of torch. It leaves a million objects that live as long as the process: that Python's
    garbage collector looks through them, then and when the process ends, is a third of a short run's time."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.enable()
            gc.freeze()  # what is there by now is never looked at again
