"""A user's own tool: `file.py:function` and the arguments that a model wrote in, its result as text out.

    Sandbox("weather.py", "forecast").call({"city": "Oslo"})   ->   "rain"

Every call is a fresh Python process (child.py), and what it does cannot take the caller with it: after `seconds` it and
all it started are killed, memory and files are bounded, what it prints goes nowhere, and its result is read up to a
bound. What else holds depends on the system; `describe` says what does here, and docs/rewards.md what that means.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from dataset.chat import JSON

CHILD = Path(__file__).with_name("child.py")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SAME_EACH_TIME = dict.fromkeys(THREADS, "1") | {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


class ToolError(Exception):
    """A call that gave no result; the message is for the model that made it."""


class Limits(NamedTuple):
    """Of one call."""

    seconds: float = 5.0
    memory: int = 1 << 29  # bytes of address space; Python itself takes 20 MB
    files: int = 1 << 20  # bytes of all that it writes
    result: int = 1 << 16  # bytes


class Described(NamedTuple):
    """What a function's signature and docstring say, and what keeps it in here."""

    description: str
    parameters: dict[str, JSON]  # JSON schema
    kept: list[str]  # of "namespaces" (no network, all it started dies with it) and "read_only" (no file elsewhere)


@dataclass
class Sandbox:
    """One function of a file."""

    path: str
    function: str
    limits: Limits = field(default_factory=Limits)

    def describe(self) -> Described:
        """Raises ToolError where the file cannot be run within the limits or has no such function."""
        reply = self.ask("describe", {})
        return Described(
            str(reply["description"]), cast(dict[str, JSON], reply["parameters"]), cast(list, reply["kept"])
        )

    def call(self, arguments: dict[str, JSON]) -> str:
        """The result: a string as it is, anything else as JSON. Raises ToolError, saying what happened instead."""
        return str(self.ask("call", arguments)["result"])

    def ask(self, what: str, arguments: dict[str, JSON]) -> dict[str, JSON]:
        if not Path(self.path).is_file():
            raise ToolError("no such file; a tool of your own is given as file.py:function")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            request = {
                "what": what,
                "file": str(Path(self.path).resolve()),
                "function": self.function,
                "arguments": arguments,
                "folder": folder,
                "limits": self.limits._asdict(),
                "path": [str(Path(entry).resolve()) for entry in sys.path],
            }
            line = self.run(json.dumps(request), folder)
        reply = cast(dict[str, JSON], json.loads(line))
        if "error" in reply:
            raise ToolError(str(reply["error"]))
        return reply

    def run(self, request: str, folder: str) -> bytes:
        """Start the child, give it the request, and take the one line it answers with. It is over when this returns."""
        read, write = os.pipe()
        environment = SAME_EACH_TIME | {"PATH": os.defpath, "HOME": folder}  # no keys of the user's
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-S", str(CHILD), str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request.encode())
            return first_line(read, self.limits)
        finally:
            os.close(read)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def first_line(file: int, limits: Limits) -> bytes:
    """What is written to a pipe up to the first line end. Raises ToolError where none comes in time, or too much."""
    deadline, text = time.monotonic() + limits.seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while b"\n" not in text:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise ToolError(f"the tool took longer than {limits.seconds:g} seconds")
            block = os.read(file, 1 << 16)
            if not block:
                raise ToolError("the tool ended without a result; it may have had too little memory")
            text += block
            if len(text) > 8 * limits.result:  # as JSON, a byte may become six characters
                raise ToolError(f"the result is longer than {limits.result} bytes")
    return text.partition(b"\n")[0]
