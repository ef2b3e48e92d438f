"""Files of rows in, token columns on disk out: encoded once, memory-mapped from then on.

    encode_files(["corpus.jsonl"], tokenizer, Rules(TEXT, max_seq_len=512), ".cache/seedling")
    -> Encoded(columns=<Arrow table: ids, file, line>, report=Report(read=1000, used=998, ...), fingerprint="3f2a...")

The columns of each part are an Arrow file, which Hugging Face `datasets` opens too, in a folder named by all that
decides its contents (the files' bytes, tokenizer, template, length, rules below). It is the same file whatever the
number of processes that encode. Those that want the same folder at once wait for the one that builds it, so no
collective with a time-out is needed around a long first tokenization.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import xxhash
from filelock import FileLock

from dataset.columns import Encoded, Report
from dataset.cores import usable_cores
from dataset.forms import CONVERSATION, PAIR, TEXT, Form, Tokens
from dataset.progress import Progress
from dataset.records import Chunk, DataError, Row, expand_paths, read_chunks, read_rows
from dataset.tokenizer import TextTokenizer
from dataset.workers import in_order

if TYPE_CHECKING:  # it needs torch, which processes that encode do without
    from dataset.loader import Loader, Rows

Files = str | list[str]
VERSION = 2  # raise it when the same rows and rules give other columns, so that old caches are left alone
SPREAD_FROM = 16 << 20  # bytes: a few seconds of one process; for less, others are not worth starting


@dataclass
class Rules:
    """Everything beside the files that decides what is encoded."""

    form: Form
    max_seq_len: int
    on_bad_row: str = "stop"
    val_fraction: float = 0.0
    part: str = "all"  # "train" and "val" are the two sides of val_fraction

    @property
    def parts(self) -> tuple[str, ...]:
        """What is encoded together, and lies in one cache folder. Bad rows are told of the first."""
        return ("all",) if self.part == "all" else ("train", "val")

    def key(self) -> tuple[object, ...]:
        """What of them names the cache. Not on_bad_row: files without a bad row give the same columns under either,
        and a cache that left bad rows out lists them, and is refused to who wants to stop at them."""
        return self.form.cache or self.form.stage, self.max_seq_len, self.val_fraction, self.parts


def encode_files(paths: list[str], tokenizer: TextTokenizer, rules: Rules, cache_dir: str | Path) -> Encoded:
    """The part that the rules name, of `encode_parts`."""
    return encode_parts(paths, tokenizer, rules, cache_dir)[rules.part]


def encode_parts(
    paths: list[str], tokenizer: TextTokenizer, rules: Rules, cache_dir: str | Path, show: bool = True
) -> dict[str, Encoded]:
    """Tokenize the files into the cache, or open what is there; all parts in one pass.

    Raises DataError for a bad row (rules.on_bad_row "stop"). `show`: whether to say how far the reading is.
    """
    key = fingerprint(paths, tokenizer, rules, show)
    folder = Path(cache_dir) / f"{rules.form.cache or rules.form.stage}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").is_file():
            build(paths, tokenizer, rules, folder)
    saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if rules.on_bad_row == "stop" and (bad := saved[rules.parts[0]]["bad"]):
        raise DataError(bad[0])
    encoded = {}
    for part in rules.parts:
        report = Report(**saved[part] | {name: Counter(saved[part][name]) for name in ("dropped", "cut")})
        encoded[part] = Encoded(open_columns(folder / f"{part}.arrow"), report, f"{key}-{part}", paths)
    return encoded


def open_columns(path: Path) -> pa.Table:
    """An Arrow stream, memory-mapped: nothing of its columns is read before it is asked for."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def fingerprint(paths: list[str], tokenizer: TextTokenizer, rules: Rules, show: bool = True) -> str:
    """Hash of the files' bytes (not their names), the tokenizer with its template, and the rules."""
    digest = xxhash.xxh3_128()
    for part in (VERSION, tokenizer.fingerprint, tokenizer.vocab_size, rules.key()):
        digest.update(repr(part).encode())
    with progress("reading data", paths, show) as done:
        for path in paths:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    done(len(block), 0)
            digest.update(b"end of file")
    return digest.hexdigest()


@contextmanager
def progress(doing: str, paths: list[str], show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What is to be told of bytes and rows as they are done; for little data it says nothing."""
    size = total_size(paths)
    if size < SPREAD_FROM:
        yield lambda size, rows: None
    else:
        with Progress(doing, size, show) as line:
            yield line.update


def total_size(paths: list[str]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def build(paths: list[str], tokenizer: TextTokenizer, rules: Rules, folder: Path) -> None:
    """Encode into a folder beside, then rename: a killed build leaves nothing that looks finished.

    What is renamed or removed was never mapped into memory: Windows refuses that for files that are.
    """
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    try:
        reports = write_parts(paths, tokenizer, rules, part)
        (part / "report.json").write_text(json.dumps({n: vars(r) for n, r in reports.items()}), encoding="utf-8")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_parts(paths: list[str], tokenizer: TextTokenizer, rules: Rules, folder: Path) -> dict[str, Report]:
    """Every part as an Arrow file; what became of the rows."""
    encoder = Encoder(paths, tokenizer, rules)
    chunks = read_chunks(paths, rules.form.expected)
    workers = usable_cores() if total_size(paths) >= SPREAD_FROM else 1
    reports, files = {name: Report() for name in rules.parts}, {}
    with ExitStack() as stack, progress("preparing data", paths) as done:
        spread = closing(in_order(encoder, chunks, workers)) if workers > 1 else nullcontext(map(encoder, chunks))
        pieces = stack.enter_context(spread)
        for name in rules.parts:
            file = stack.enter_context(open(folder / f"{name}.arrow", "wb"))
            files[name] = stack.enter_context(pa.ipc.new_stream(file, encoder.schema))
        for piece in pieces:
            for name, (batch, report) in piece.parts.items():
                files[name].write_batch(batch)
                add(reports[name], report)
            done(piece.size, sum(report.read for _, report in piece.parts.values()))
    return reports


def add(report: Report, more: Report) -> None:
    """Count what became of further rows."""
    for name, count in vars(more).items():
        setattr(report, name, getattr(report, name) + count)


class Piece(NamedTuple):
    """What a chunk of lines becomes."""

    size: int  # bytes of the file
    parts: dict[str, tuple[pa.RecordBatch, Report]]


@dataclass
class Encoder:
    """A chunk of lines in, a piece of every part out; the same one wherever and in whatever order it is asked."""

    paths: list[str]
    tokenizer: TextTokenizer
    rules: Rules

    @property
    def schema(self) -> pa.Schema:
        """Columns of all parts."""
        ids = pa.list_(pa.uint16() if self.tokenizer.vocab_size <= 1 << 16 else pa.uint32())
        own = dict.fromkeys(self.rules.form.token_columns, ids) | self.rules.form.other_columns
        return pa.schema(own | {"file": pa.int16(), "line": pa.int32()})

    def __call__(self, chunk: Chunk) -> Piece:
        """Raises DataError for a bad row (rules.on_bad_row "stop") and for a file that ends in an error."""
        rules, first = self.rules, self.rules.parts[0]
        reports = {name: Report() for name in rules.parts}
        rows: dict[str, list[dict[str, list[int] | int | str]]] = {name: [] for name in rules.parts}
        bad = reports[first].bad
        for row in read_rows(chunk, rules.form, rules.on_bad_row, bad):
            name = first if rules.part == "all" or not is_held_out(row, rules) else "val"
            try:
                tokens = encode_row(row, self.tokenizer, rules, reports[name])
            except DataError as error:
                if rules.on_bad_row == "stop":
                    raise
                bad.append(str(error))
                continue
            if tokens is not None:
                rows[name].append(tokens.columns | {"file": self.paths.index(row.path), "line": row.line})
        for report in reports.values():
            report.read = report.used + sum(report.dropped.values()) + len(report.bad)
        batches = {name: pa.RecordBatch.from_pylist(rows[name], self.schema) for name in rules.parts}
        return Piece(chunk.size, {name: (batches[name], reports[name]) for name in rules.parts})


def encode_row(row: Row, tokenizer: TextTokenizer, rules: Rules, report: Report) -> Tokens | None:
    """A row in tokens, counted. None for one that is dropped.

    Raises DataError for one that the chat template cannot say.
    """
    try:
        tokens = rules.form.encode(row.value, tokenizer, rules.max_seq_len, report)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None
    if tokens is not None:
        report.used += 1
        report.tokens += tokens.total
        report.supervised += tokens.supervised
    return tokens


def is_held_out(row: Row, rules: Rules) -> bool:
    """Whether the row belongs to the validation part: by a hash of its document (of the prompt in SFT and DPO, so that
    one prompt's rows stay on one side), never by its place in the file."""
    key = rules.form.split_key(row.value)
    # a lone surrogate (in a field that is not checked, such as a name) has no UTF-8
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogatepass")) < rules.val_fraction * 2**64


def build_parts(
    form: Form,
    data_path: str | Path | list[str],
    tokenizer: TextTokenizer,
    max_seq_len: int,
    *,
    part: str = "all",
    val_fraction: float = 0.0,
    on_bad_row: str = "stop",
    cache_dir: str | Path = ".cache",
    show: bool = True,
) -> "dict[str, Rows | None]":
    """Files -> packed rows of this part and of those that are encoded with it; encoded into the cache first where they
    are new. None where no row is left in a part.

    part "train" or "val" is one side of a split that keeps `val_fraction` of the documents, by their hash, for "val".
    `show`: whether to say how far the reading of much data is; encoding always says it.
    Raises FileNotFoundError, and DataError for a bad row or one of another form.
    """
    from dataset import loader

    rows: Callable[[Encoded, int, int], Rows] = getattr(loader, form.rows)
    rules = Rules(form, max_seq_len, on_bad_row, val_fraction, part)
    parts = encode_parts(expand_paths(data_path), tokenizer, rules, cache_dir, show)
    return {
        name: rows(encoded, max_seq_len, tokenizer.pad_id) if encoded.report.used else None
        for name, encoded in parts.items()
    }


def build_rows(
    form: Form,
    data_path: str | Path | list[str],
    tokenizer: TextTokenizer,
    max_seq_len: int,
    *,
    part: str = "all",
    **settings: Any,
) -> "Rows | None":
    """One part of `build_parts`, which takes the same settings."""
    return build_parts(form, data_path, tokenizer, max_seq_len, part=part, **settings)[part]


def build_pretrain_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> "Loader":
    """Packed documents of {"text": ...} rows; settings go to build_rows and Loader."""
    return build_loader(TEXT, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_sft_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> "Loader":
    """Packed conversations; labels stand on assistant turns only."""
    return build_loader(CONVERSATION, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_dpo_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> "Loader":
    """Packed preference pairs, in rows of 2 * max_seq_len. No batch comes before `loader.rows` has a reference."""
    return build_loader(PAIR, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_loader(
    form: Form, data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> "Loader":
    """Raises ValueError where the files hold nothing to learn from."""
    from dataset.loader import Loader

    for_rows = {
        name: settings.pop(name)
        for name in ("part", "val_fraction", "on_bad_row", "cache_dir", "show")
        if name in settings
    }
    rows = build_rows(form, data_path, tokenizer, max_seq_len, **for_rows)
    if rows is None:
        raise ValueError(f"{data_path}: no row is left to learn from")
    return Loader(rows, batch_size, **settings)
