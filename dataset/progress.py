"""How far a long piece of work is, on stderr: one line rewritten on a terminal, a new line every ten seconds in a log.

    preparing data: 1,204 of 2,048 MB, 3,310,552 rows, 25.2 MB/s, 00:33 left

What takes less than a second says nothing.
"""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

MB = 1 << 20


class Progress:
    """Told of bytes that are done; it says so when it is time to."""

    def __init__(self, doing: str, total: int, show: bool = True, unit: str = "MB"):
        """total: bytes there are to do, or pieces of another `unit`."""
        self.doing, self.total, self.show, self.unit = doing, total, show, unit
        self.size = MB if unit == "MB" else 1
        self.terminal = sys.stderr.isatty()
        self.done = self.rows = 0
        self.began = time.monotonic()
        self.next = self.began + (1 if self.terminal else 10)
        self.spoke = False

    def __enter__(self) -> Self:
        return self

    def update(self, size: int, rows: int = 0) -> None:
        """`size` more bytes (or pieces) are done, and the rows that they held."""
        self.done += size
        self.rows += rows
        now = time.monotonic()
        if self.show and now >= self.next:
            self.next = now + (0.2 if self.terminal else 10)
            speed = self.done / (now - self.began)
            left = tqdm.format_interval(int((self.total - self.done) / speed)) if speed else "?"
            done = f"{self.done / self.size:,.0f} of {self.total / self.size:,.0f} {self.unit}"
            self.say(f"{done}{self.counted()}, {speed / self.size:,.1f} {self.unit}/s, {left} left")

    def counted(self) -> str:
        return f", {self.rows:,} rows" if self.rows else ""

    def say(self, text: str) -> None:
        line = f"{self.doing}: {text}"
        print(f"\r{line}\x1b[K" if self.terminal else f"{line}\n", end="", file=sys.stderr, flush=True)
        self.spoke = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.spoke:
            return
        if error is None:
            seconds = tqdm.format_interval(int(time.monotonic() - self.began))
            self.say(f"{self.done / self.size:,.0f} {self.unit}{self.counted()} in {seconds}")
        if self.terminal:
            print(file=sys.stderr, flush=True)
