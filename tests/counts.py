"""Counts that say how readable the house is. `python -m tests.counts` prints them; tests/test_house.py holds them.

    follow("pretrain")     every call that crosses from one of our files to another while one row becomes an update
    words()                lines of code outside tests, how often `Any` and `type: ignore` stand in them
    longest_functions()    [(lines, file, name), ...]

A crossing is counted once, however often it is made. The way begins where files become rows (build_parts) and ends with
the optimizer's step; what starts, saves or reports a run is not on it.
"""

import ast
import json
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers import ROOT, TINY, train_here, write_jsonl

ROOMS = ("model", "dataset", "training", "evaluation", "export", "serving", "scripts")
INSIDE = tuple(f"{ROOT / room}/" for room in ROOMS)
WAY = {"build_parts", "update", "forward_backward", "step"}  # functions that the way leads through
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
ROW: dict[str, dict[str, Any]] = {"pretrain": {"text": "one row"}, "full_sft": {"conversations": [USER, ASSISTANT]}}
Crossing = tuple[str, str]  # "file:function" of caller and called


def sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])


def ours(frame: FrameType) -> bool:
    """Whether it is one of our named functions that runs."""
    return frame.f_code.co_filename.startswith(INSIDE) and not frame.f_code.co_name.startswith("<")


def our_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards."""
    while frame is not None:
        if ours(frame):
            yield frame
        frame = frame.f_back


def name(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_qualname}"


def follow(stage: str) -> list[Crossing]:
    found: dict[Crossing, None] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not ours(frame):
            return
        frames = list(our_frames(frame))
        if not any(each.f_code.co_name in WAY for each in frames):
            return
        if len(frames) == 1:  # asked ahead of time, in a thread
            found[("training/loop.py:Upcoming.take", name(frame))] = None
        elif frames[1].f_code.co_filename != frame.f_code.co_filename:
            found[(name(frames[1]), name(frame))] = None

    with tempfile.TemporaryDirectory() as folder:
        data = write_jsonl(Path(folder) / "rows.jsonl", [ROW[stage]])
        files = ["--data_path", data, "--out_dir", folder, "--cache_dir", folder, "--init_from", "none"]
        flags = [*files, "--dim", 32, *TINY, "--val_fraction", 0, "--max_steps", 1, "--save_interval", 0]
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            train_here(stage, *flags)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]  # its stub does not know that None ends it
    return list(found)


def files(crossings: list[Crossing]) -> set[str]:
    return {place.split(":")[0] for crossing in crossings for place in crossing}


def words() -> dict[str, int]:
    texts = [path.read_text(encoding="utf-8") for path in sources()]
    patterns = {"lines": r"\n", "Any": r"\bAny\b", "type: ignore": r"type: ignore"}
    return {word: sum(len(re.findall(pattern, text)) for text in texts) for word, pattern in patterns.items()}


def longest_functions() -> list[tuple[int, str, str]]:
    found = [
        (node.end_lineno - node.lineno + 1, str(path.relative_to(ROOT)), node.name)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    return sorted(found, reverse=True)


if __name__ == "__main__":
    for stage in ROW:
        crossings = follow(stage)
        print("\n".join(f"{caller} -> {called}" for caller, called in crossings))
        print(f"{stage}: {len(crossings)} crossings between {len(files(crossings))} files\n")
    counts = words()
    for word in ("Any", "type: ignore"):
        print(f"{word}: {counts[word] / counts['lines'] * 1000:.1f} a thousand of {counts['lines']:,} lines")
    print("longest functions:", json.dumps(longest_functions()[:5]))
