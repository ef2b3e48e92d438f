"""Files of rows in, token columns on disk out: encoded once, memory-mapped from then on.

    encode_files(["corpus.jsonl"], tokenizer, Rules(TEXT, max_seq_len=512), ".cache/seedling")
    -> Encoded(columns=<Arrow table: ids, file, line>, report=Report(read=1000, used=998, ...), fingerprint="3f2a...")

The columns are an Arrow table of Hugging Face `datasets` in a folder named by everything that decides its contents
(the files' bytes, tokenizer, template, length, rules below). Processes that want the same folder at once wait for the
one that builds it, so no collective with a time-out is needed around a long first tokenization.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import xxhash
from filelock import FileLock

from dataset.forms import CONVERSATION, PAIR, TEXT, Form, Tokens
from dataset.loader import Encoded, Loader, Report, Rows
from dataset.records import DataError, Row, expand_paths, read_rows
from dataset.tokenizer import TextTokenizer

Files = str | list[str]
VERSION = 2  # raise it when the same rows and rules give other columns, so that old caches are left alone


@dataclass
class Rules:
    """Everything beside the files that decides what is encoded."""

    form: Form
    max_seq_len: int
    on_bad_row: str = "stop"
    val_fraction: float = 0.0
    part: str = "all"  # "train" and "val" are the two sides of val_fraction

    def key(self) -> dict[str, object]:
        """What of them names the cache."""
        return {"stage": self.form.stage} | {name: value for name, value in vars(self).items() if name != "form"}


def encode_files(paths: list[str], tokenizer: TextTokenizer, rules: Rules, cache_dir: str | Path) -> Encoded:
    """Tokenize the files into the cache, or open what is there.

    Raises DataError for a bad row (rules.on_bad_row "stop").
    """
    key = fingerprint(paths, tokenizer, rules)
    folder = Path(cache_dir) / f"{rules.form.stage}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").is_file():
            build(paths, tokenizer, rules, folder)
    saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report = Report(**saved | {"dropped": Counter(saved["dropped"]), "cut": Counter(saved["cut"])})
    return Encoded(datasets.load_from_disk(str(folder)), report, key)


def fingerprint(paths: list[str], tokenizer: TextTokenizer, rules: Rules) -> str:
    """Hash of the files' bytes (not their names), the tokenizer with its template, and the rules."""
    digest = xxhash.xxh3_128()
    for part in (VERSION, tokenizer.fingerprint, tokenizer.vocab_size, rules.key()):
        digest.update(repr(part).encode())
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(b"end of file")
    return digest.hexdigest()


def build(paths: list[str], tokenizer: TextTokenizer, rules: Rules, folder: Path) -> None:
    """Encode into a folder beside, then rename: a killed build leaves nothing that looks finished."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    report = Report()
    ids = datasets.List(datasets.Value("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"))
    where = {"file": datasets.Value("int16"), "line": datasets.Value("int32")}
    own = dict.fromkeys(rules.form.token_columns, ids) | rules.form.other_columns
    features = datasets.Features(own | where)
    datasets.disable_progress_bars()  # the start table says what there is to know
    try:
        table = datasets.Dataset.from_generator(
            generate_rows,
            features=features,
            cache_dir=str(part / "raw"),
            fingerprint=folder.name,
            # `report` is filled while the generator runs, in this process
            gen_kwargs={"encoder": Encoder(paths, tokenizer, rules, report)},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise (error.__cause__ or error) from None
    except ValueError:
        if report.used:
            raise
        table = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    # an empty part would be saved as no shards at all, which cannot be opened
    table.save_to_disk(str(part / "table"), num_shards=None if len(table) else 1)
    (part / "table" / "report.json").write_text(json.dumps(vars(report)), encoding="utf-8")
    (part / "table").rename(folder)
    shutil.rmtree(part)


@dataclass
class Encoder:
    """The files, tokenizer, rules and report of one build."""

    paths: list[str]
    tokenizer: TextTokenizer
    rules: Rules
    report: Report

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "rules": self.rules}  # what `datasets` may hash; the folder's name says the rest

    def rows(self) -> Iterator[Row]:
        """The checked rows of this part, counted."""
        bad: list[str] = []
        for row in read_rows(self.paths, self.rules.form, self.rules.on_bad_row, bad):
            if self.rules.part != "all" and (self.rules.part == "val") != is_held_out(row, self.rules):
                continue
            self.report.read += 1
            yield row
        if self.rules.part != "val":  # both parts read all lines; a line that is no row is told once
            self.report.read += len(bad)
            self.report.bad += bad

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Tokens]]:
        """Each row with its tokens. One that is dropped is counted and left out; so is one that the chat template
        cannot say."""
        rules = self.rules
        for row in rows:
            try:
                tokens = rules.form.encode(row.value, self.tokenizer, rules.max_seq_len, self.report)
            except ValueError as error:
                message = f"{row.where}: {error}"
                if rules.on_bad_row == "stop":
                    raise DataError(message) from None
                self.report.bad.append(message)
                continue
            if tokens is not None:
                yield row, tokens


def generate_rows(encoder: Encoder) -> Iterator[dict[str, Any]]:
    """All rows of one part as Arrow rows, and the counts of the report."""
    report, file_numbers = encoder.report, {path: number for number, path in enumerate(encoder.paths)}
    for row, tokens in encoder.encode(encoder.rows()):
        report.used += 1
        report.tokens += tokens.total
        report.supervised += tokens.supervised
        yield tokens.columns | {"file": file_numbers[row.path], "line": row.line}


def is_held_out(row: Row, rules: Rules) -> bool:
    """Whether the row belongs to the validation part: by a hash of its document (of the prompt in SFT and DPO, so that
    one prompt's rows stay on one side), never by its place in the file."""
    key = rules.form.split_key(row.value)
    # a lone surrogate (in a field that is not checked, such as a name) has no UTF-8
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogatepass")) < rules.val_fraction * 2**64


def build_rows(
    form: Form,
    data_path: str | Path | list[str],
    tokenizer: TextTokenizer,
    max_seq_len: int,
    *,
    part: str = "all",
    val_fraction: float = 0.0,
    on_bad_row: str = "stop",
    cache_dir: str | Path = ".cache",
) -> Rows | None:
    """Files -> packed rows, encoded into the cache first where they are new. None where no row is left in this part.

    part "train" or "val" is one side of a split that keeps `val_fraction` of the documents, by their hash, for "val".
    Raises FileNotFoundError, and DataError for a bad row or one of another form.
    """
    rules = Rules(form, max_seq_len, on_bad_row, val_fraction, part)
    encoded = encode_files(expand_paths(data_path), tokenizer, rules, cache_dir)
    return form.rows(encoded, max_seq_len, tokenizer.pad_id) if encoded.report.used else None


def build_pretrain_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed documents of {"text": ...} rows; settings go to build_rows and Loader."""
    return build_loader(TEXT, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_sft_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed conversations; labels stand on assistant turns only."""
    return build_loader(CONVERSATION, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_dpo_loader(
    data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Packed preference pairs, in rows of 2 * max_seq_len. No batch comes before `loader.rows` has a reference."""
    return build_loader(PAIR, data_path, tokenizer, max_seq_len, batch_size, **settings)


def build_loader(
    form: Form, data_path: Files, tokenizer: TextTokenizer, max_seq_len: int, batch_size: int, **settings: Any
) -> Loader:
    """Raises ValueError where the files hold nothing to learn from."""
    for_rows = {
        name: settings.pop(name) for name in ("part", "val_fraction", "on_bad_row", "cache_dir") if name in settings
    }
    rows = build_rows(form, data_path, tokenizer, max_seq_len, **for_rows)
    if rows is None:
        raise ValueError(f"{data_path}: no row is left to learn from")
    return Loader(rows, batch_size, **settings)
