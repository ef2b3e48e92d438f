"""Lines of JSONL files in, checked rows out; a bad line is named where it stands.

    corpus.jsonl, line 3:  {"text": "Once upon"}   ->  Row(path="corpus.jsonl", line=3, value={"text": "Once upon"})
    corpus.jsonl, line 4:  {"text": "Once           ->  DataError: corpus.jsonl:4: found broken JSON (...), expected ...

Files are UTF-8, with or without a byte order mark, lines ending in LF or CRLF, plain or compressed (.gz, .zst).
Lines are split at LF alone and decoded one by one, so that a broken line never hides the next.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from dataset.forms import FORMS, Form, Value, kind, shorten


class DataError(ValueError):
    """A row or a file that cannot be used; the message starts with `path:line:`."""


@dataclass
class Row:
    """One checked row. SFT rows have their messages under "conversations", whichever of the two names the file used."""

    path: str
    line: int
    value: Value

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


def expand_paths(patterns: str | Path | Iterable[str | Path]) -> list[str]:
    """Files and globs -> existing files; a glob's files sorted, no file twice.

    Raises FileNotFoundError for an empty match.
    """
    patterns = [patterns] if isinstance(patterns, (str, Path)) else list(patterns)
    if not patterns:
        raise FileNotFoundError("no data file was given; give one with --data_path")
    paths: list[str] = []
    for pattern in map(str, patterns):
        if Path(pattern).is_dir():
            raise FileNotFoundError(
                f"{pattern} is a folder; give its files, for example --data_path '{pattern}/*.jsonl'"
            )
        found = (
            [pattern]
            if Path(pattern).is_file()
            else sorted(filter(lambda p: Path(p).is_file(), glob.glob(pattern, recursive=True)))
        )
        if not found:
            raise FileNotFoundError(f"{pattern}: no such file (and no file matches it as a glob); check --data_path")
        paths += [path for path in found if path not in paths]
    return paths


def open_binary(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(ZstdReader(path))
    return open(path, "rb")


class ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file, whose frames may follow one another, as `cat a.zst b.zst` makes them.

    Raises EOFError where the file ends inside a frame; zstandard's own reader takes that for the end of the data.
    """

    def __init__(self, path: str):
        self.file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self.frame: zstandard.ZstdDecompressionObj | None = None  # the decompressor of the frame the file stands in
        self.compressed = b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            block = self.compressed or self.file.read(1 << 16)
            if not block:
                if self.frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready = memoryview(self.frame.decompress(block))
            self.compressed = self.frame.unused_data  # what follows the end of the frame
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without line end); a file that cannot be decompressed is named with its line."""
    number = 0
    try:
        with open_binary(path) as file:
            for raw in file:
                number += 1
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield number, raw.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}:{number + 1}: found damaged compressed data ({error}), expected a whole file; "
            "fetch or compress it again"
        ) from None


def read_rows(
    paths: Iterable[str], form: Form, on_bad_row: str = "stop", bad_rows: list[str] | None = None
) -> Iterator[Row]:
    """Checked rows of all files, in order. Blank lines are no rows.

    A bad row raises DataError, or with on_bad_row "skip" its message is appended to `bad_rows`. A file with no row at
    all raises DataError in either case.
    """
    for path in paths:
        rows = 0
        for number, raw in read_lines(path):
            if not raw.strip():
                continue
            rows += 1
            try:
                yield Row(path, number, parse_row(raw, form))
            except ValueError as error:
                message = f"{path}:{number}: {error}"
                if on_bad_row == "stop":
                    raise DataError(message) from None
                if bad_rows is not None:
                    bad_rows.append(message)
        if rows == 0:
            raise DataError(f"{path}:1: found an empty file, expected rows like {form.expected}")


def parse_row(raw: bytes, form: Form) -> Value:
    """One line's bytes -> checked row. Raises ValueError saying what was found and what was expected."""
    row = parse_json(raw, form.expected)
    if not isinstance(row, dict):
        hint = " (a whole JSON array in one file? write one object a line)" if isinstance(row, list) else ""
        raise ValueError(f"found {kind(row)}, expected {form.expected}{hint}")
    if "messages" in row and "conversations" not in row:
        row["conversations"] = row.pop("messages")
    form.check(row)
    return row


def parse_json(raw: bytes, expected: str) -> object:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"found bytes that are not UTF-8 (byte {error.start + 1} of the line, 0x{raw[error.start]:02x}), "
            "expected UTF-8 text; convert the file"
        ) from None
    except RecursionError:
        raise ValueError(f"found JSON nested too deeply to read, expected {expected}") from None
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos >= len(raw.decode("utf-8").rstrip())
        raise ValueError(
            f"found broken JSON ({error.msg.removesuffix(' at')} at character {error.colno} of {shorten(raw)})"
            f"{'; the line is cut short' if cut else ''}, expected {expected}"
        ) from None


def form_of(path: str | Path) -> Form:
    """The form of a file's first readable row, by its keys. Raises FileNotFoundError, or DataError for none."""
    (path,) = expand_paths(path)
    for _, raw in read_lines(path):
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            keys = {"conversations" if key == "messages" else key for key in row}
            for form in FORMS:
                if form.keys & keys:
                    return form
    raise DataError(f"{path}:1: found no row of a known form, expected {' or '.join(f.expected for f in FORMS)}")
