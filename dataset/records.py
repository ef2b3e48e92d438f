"""Lines of JSONL files in, checked rows out; a bad line is named where it stands.

    corpus.jsonl, line 3:  {"text": "Once upon"}   ->  Row(path="corpus.jsonl", line=3, value={"text": "Once upon"})
    corpus.jsonl, line 4:  {"text": "Once           ->  DataError: corpus.jsonl:4: found broken JSON (...), expected ...

Files are UTF-8, with or without a byte order mark, lines ending in LF or CRLF, plain or compressed (.gz, .zst).
Lines are split at LF alone and decoded one by one, so that a broken line never hides the next.
"""

import errno
import glob
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from dataset.forms import FORMS, Form, Value, kind, shorten
from dataset.hub import SCHEME, local_path


class DataError(ValueError):
    """A row or a file that cannot be used; the message starts with `path:line:`."""


WHAT_TO_DO = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path that can be written",
}


def one_line(error: Exception) -> str:
    """An error that a user can do something about, in words; one of the system with its file and with what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    hint = f"; {WHAT_TO_DO[error.errno]}" if error.errno in WHAT_TO_DO else ""
    return f"{where}{error.strerror}{hint}"


@dataclass
class Row:
    """One checked row, as its form writes it: SFT rows have their messages under "conversations", whichever way the
    file had them."""

    path: str
    line: int
    value: Value

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


def expand_paths(patterns: str | Path | Iterable[str | Path]) -> list[str]:
    """Files, globs and hf://datasets/USER/NAME/FILE -> existing files; a glob's files sorted, no file twice.

    Raises FileNotFoundError for an empty match.
    """
    patterns = [patterns] if isinstance(patterns, (str, Path)) else list(patterns)
    if not patterns:
        raise FileNotFoundError("no data file was given; give one with --data_path")
    paths: list[str] = []
    for pattern in map(str, patterns):
        if pattern.startswith(SCHEME):
            pattern = local_path(pattern)
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


@dataclass
class Chunk:
    """Neighbouring lines of one file, blank ones left out: what one process is given to do at a time."""

    path: str
    lines: list[tuple[int, bytes]]  # number from 1, bytes without line end
    size: int  # bytes of the file, as it lies on the disk, that were read for them
    end: str | None = None  # the error that the file ends with after these lines


def read_chunks(paths: Iterable[str], expected: str, size: int = 1 << 20) -> Iterator[Chunk]:
    """All lines of all files, in order, in chunks of about `size` bytes of text.

    What is wrong with a file comes as the `end` of a chunk, so that it is told after what is wrong with lines before.
    """
    for path in paths:
        lines: list[tuple[int, bytes]] = []
        held = before = rows = 0
        end = None
        with open(path, "rb") as file:
            try:
                for number, raw in read_lines(path, file):
                    if raw.strip():
                        lines.append((number, raw))
                        held += len(raw)
                    if held >= size:
                        yield Chunk(path, lines, file.tell() - before)
                        before, rows, lines, held = file.tell(), rows + len(lines), [], 0
            except DataError as error:
                end = str(error)
            if not end and not rows + len(lines):
                end = f"{path}:1: found an empty file, expected rows like {expected}"
            yield Chunk(path, lines, file.tell() - before, end)


def decompressed(file: BinaryIO, path: str) -> BinaryIO | io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.endswith(".zst"):
        return io.BufferedReader(ZstdReader(file))
    return file


class ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file, whose frames may follow one another, as `cat a.zst b.zst` makes them.

    Raises EOFError where the file ends inside a frame; zstandard's own reader takes that for the end of the data.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
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


def read_lines(path: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without line end); a file that cannot be decompressed is named with its line."""
    number = 0
    try:
        for raw in decompressed(file, path):
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
    source: Iterable[str] | Chunk, form: Form, on_bad_row: str = "stop", bad_rows: list[str] | None = None
) -> Iterator[Row]:
    """Checked rows of all files, or of one chunk of lines, in order. Blank lines are no rows.

    A bad row raises DataError, or with on_bad_row "skip" its message is appended to `bad_rows`. A file with no row at
    all raises DataError in either case.
    """
    for chunk in [source] if isinstance(source, Chunk) else read_chunks(source, form.expected):
        for number, raw in chunk.lines:
            try:
                yield Row(chunk.path, number, parse_row(raw, form))
            except ValueError as error:
                message = f"{chunk.path}:{number}: {error}{conversion(chunk.path, raw)}"
                if on_bad_row == "stop":
                    raise DataError(message) from None
                if bad_rows is not None:
                    bad_rows.append(message)
        if chunk.end:
            raise DataError(chunk.end)


def conversion(path: str, raw: bytes) -> str:
    """What turns a file into JSONL, where this line of it says that it is something else; "" where it does not."""
    if raw.lstrip().startswith(b"["):
        what, rows = "a JSON array", "json.load(open(sys.argv[1], encoding='utf-8-sig'))"
    elif Path(path).suffix.lower() == ".csv":
        what, rows = "a table", "csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'))"
    else:
        return ""
    return (
        f"; {what} in one file? this writes one object a line: "
        f'python -c "import csv, json, sys; [print(json.dumps(row)) for row in {rows}]" '
        f"{shlex.quote(path)} > {shlex.quote(Path(path).stem + '.jsonl')}"
    )


def parse_row(raw: bytes, form: Form) -> Value:
    """One line's bytes -> checked row. Raises ValueError saying what was found and what was expected."""
    row = parse_json(raw, form.expected)
    if not isinstance(row, dict):
        raise ValueError(f"found {kind(row)}, expected {form.expected}")
    return form.check(row)


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
    with open(path, "rb") as file:
        for _, raw in read_lines(path, file):
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                for form in FORMS:
                    if form.keys & form.normalise(row).keys():
                        return form
    raise DataError(f"{path}:1: found no row of a known form, expected {' or '.join(f.expected for f in FORMS)}")
