"""Checked rows in, token columns on disk out: encoded once, memory-mapped from then on.

    {"text": "Hi"}                          -> ids [1, 912, 2]                         <s> text </s>
    {"conversations": [user, assistant]}    -> ids [...], spans [7, 12]                tokens 7..12 are the assistant's
    {"chosen": [...], "rejected": [...]}    -> chosen [...], rejected [...], prompt 7  both begin with the same 7 tokens

The columns are an Arrow table of Hugging Face `datasets` in a folder named by everything that decides its contents
(the files' bytes, tokenizer, template, length, rules below). Processes that want the same folder at once wait for the
one that builds it, so no collective with a time-out is needed around a long first tokenization.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash
from filelock import FileLock

from dataset.chat import render_chat
from dataset.records import DataError, Row, Stage, read_rows

CHUNK = 512  # rows given to the tokenizer at a time
VERSION = 1  # raise it when the same rows and rules give other columns, so that old caches are left alone


@dataclass
class Report:
    """What became of the rows of one part (training or validation)."""

    read: int = 0
    used: int = 0
    bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised: int = 0


@dataclass
class Encoded:
    """One part's token columns, its report, and the key that stands for its contents."""

    columns: datasets.Dataset
    report: Report
    fingerprint: str
    stage: Stage


@dataclass
class Rules:
    """Everything beside the files that decides what is encoded."""

    stage: Stage
    max_seq_len: int
    on_bad_row: str = "stop"
    val_fraction: float = 0.0
    part: str = "all"  # "train" and "val" are the two sides of val_fraction


def encode_files(paths: list[str], tokenizer: Any, rules: Rules, cache_dir: str | Path) -> Encoded:
    """Tokenize the files into the cache, or open what is there. Raises DataError for a bad row (rules.on_bad_row "stop")."""
    key = fingerprint(paths, tokenizer, rules)
    folder = Path(cache_dir) / f"{rules.stage}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").is_file():
            build(paths, tokenizer, rules, folder)
    saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report = Report(**saved | {"dropped": Counter(saved["dropped"]), "cut": Counter(saved["cut"])})
    return Encoded(datasets.load_from_disk(str(folder)), report, key, rules.stage)


def fingerprint(paths: list[str], tokenizer: Any, rules: Rules) -> str:
    """Hash of the files' bytes (not their names), the tokenizer with its template, and the rules."""
    digest = xxhash.xxh3_128()
    for part in (VERSION, tokenizer.fingerprint, tokenizer.vocab_size, asdict(rules)):
        digest.update(repr(part).encode())
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(b"end of file")
    return digest.hexdigest()


def build(paths: list[str], tokenizer: Any, rules: Rules, folder: Path) -> None:
    """Encode into a folder beside, then rename: a killed build leaves nothing that looks finished."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    report = Report()
    ids = datasets.List(datasets.Value("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"))
    spans = {"full_sft": {"spans": datasets.List(datasets.Value("int32"))}}.get(rules.stage, {})
    columns = (
        {"chosen": ids, "rejected": ids, "prompt": datasets.Value("int32")}
        if rules.stage == "dpo"
        else {"ids": ids, **spans}
    )
    features = datasets.Features(columns | {"file": datasets.Value("int16"), "line": datasets.Value("int32")})
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
    tokenizer: Any
    rules: Rules
    report: Report

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "rules": self.rules}  # what `datasets` may hash; the folder's name says the rest

    def rows(self) -> Iterator[Row]:
        """The checked rows of this part, counted."""
        bad: list[str] = []
        for row in read_rows(self.paths, self.rules.stage, self.rules.on_bad_row, bad):  # type: ignore[arg-type]
            if self.rules.part != "all" and (self.rules.part == "val") != is_held_out(row, self.rules):
                continue
            self.report.read += 1
            yield row
        if self.rules.part != "val":  # both parts read all lines; a line that is no row is told once
            self.report.read += len(bad)
            self.report.bad += bad

    def encode(self, rows: list[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Each row with its columns; rows that are dropped are counted and left out."""
        if self.rules.stage == "pretrain":
            texts = [row.value["text"] for row in rows]
            for row, ids in zip(rows, self.tokenizer.encode_batch(texts), strict=True):
                if not ids:
                    self.report.dropped["empty text"] += 1
                    continue
                yield row, {"ids": encode_document(self.tokenizer, ids)}
            return
        encode_one = self.encode_conversation if self.rules.stage == "full_sft" else self.encode_pair
        for row in rows:
            try:
                columns = encode_one(row.value)
            except ValueError as error:  # a row that is well-formed but that the chat template cannot say
                message = f"{row.where}: {error}"
                if self.rules.on_bad_row == "stop":
                    raise DataError(message) from None
                self.report.bad.append(message)
                continue
            if columns is not None:
                yield row, columns

    def encode_conversation(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Render, and cut what is longer than a row: at the end of the last answer that fits, else inside the first."""
        rendered = render_chat(self.tokenizer, row["conversations"])
        ids, spans = rendered.ids, spans_of(rendered.mask)
        limit = self.rules.max_seq_len + 1  # n + 1 tokens make n pairs of input and label
        if len(ids) > limit:
            ends = [end for _, end in spans if end <= limit]
            whole = max(ends, default=limit)
            ids, spans = ids[:whole], [(start, min(end, whole)) for start, end in spans if start < whole]
            if spans:
                self.report.cut["at the end of an answer" if ends else "inside an answer"] += 1
                self.report.cut["tokens left out"] += len(rendered.ids) - whole
        # the very first token is never a label
        if not any(end > max(start, 1) for start, end in spans):
            reason = "no answer in the row" if not any(rendered.mask) else "prompt longer than max_seq_len"
            self.report.dropped[reason] += 1
            return None
        ids = ids[: spans[-1][1]]  # nothing after the last answer is learnt from
        return {"ids": ids, "spans": [edge for span in spans for edge in span]}

    def encode_pair(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Render both answers after one rendering of the prompt; answers are cut at max_seq_len, prompts never."""
        prompt = render_chat(self.tokenizer, row["chosen"][:-1], add_generation_prompt=True).ids
        limit = self.rules.max_seq_len + 1
        sides = {side: render_chat(self.tokenizer, row[side]).ids for side in ("chosen", "rejected")}
        for side, ids in sides.items():
            if ids[: len(prompt)] != prompt:
                raise ValueError(
                    f"the {side} answer changes how its prompt is rendered by this tokenizer's chat template"
                )
        reason = None
        if len(prompt) >= limit:
            reason = "prompt longer than max_seq_len"
        elif sides["chosen"][:limit] == sides["rejected"][:limit]:
            reason = "same answer on both sides" + (
                " within max_seq_len" if sides["chosen"] != sides["rejected"] else ""
            )
        if reason:
            self.report.dropped[reason] += 1
            return None
        if too_long := [ids for ids in sides.values() if len(ids) > limit]:
            self.report.cut["inside an answer"] += 1
            self.report.cut["tokens left out"] += sum(len(ids) - limit for ids in too_long)
        return {side: ids[:limit] for side, ids in sides.items()} | {"prompt": len(prompt)}


def generate_rows(encoder: Encoder) -> Iterator[dict[str, Any]]:
    """All rows of one part as Arrow rows, and the counts of the report."""
    report, file_numbers = encoder.report, {path: number for number, path in enumerate(encoder.paths)}
    for rows in batched_rows(encoder.rows()):
        for row, columns in encoder.encode(rows):
            report.used += 1
            tokens, supervised = count_tokens(columns)
            report.tokens += tokens
            report.supervised += supervised
            yield columns | {"file": file_numbers[row.path], "line": row.line}


def batched_rows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def start_document(tokenizer: Any, ids: list[int]) -> list[int]:
    """`<s>` text; a tokenizer without a beginning-of-sequence token starts with the text."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *ids]


def encode_document(tokenizer: Any, ids: list[int]) -> list[int]:
    """`<s>` text `</s>`."""
    return [*start_document(tokenizer, ids), tokenizer.eos_id]


def count_tokens(columns: dict[str, Any]) -> tuple[int, int]:
    """(tokens, supervised tokens). The first token of a document is read but never predicted."""
    if "prompt" in columns:
        lengths = [len(columns["chosen"]), len(columns["rejected"])]
        return sum(lengths), sum(lengths) - 2 * columns["prompt"]
    if "spans" in columns:
        spans = np.asarray(columns["spans"]).reshape(-1, 2)
        return len(columns["ids"]), int((spans[:, 1] - np.maximum(spans[:, 0], 1)).sum())
    return len(columns["ids"]), len(columns["ids"]) - 1


def spans_of(mask: list[bool]) -> list[tuple[int, int]]:
    """[F, T, T, F, T] -> [(1, 3), (4, 5)]."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(mask, dtype=np.int8), [0]))))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def is_held_out(row: Row, rules: Rules) -> bool:
    """Whether the row belongs to the validation part: by a hash of its document (of the prompt in SFT and DPO, so that
    one prompt's rows stay on one side), never by its place in the file."""
    if rules.stage == "pretrain":
        document = row.value["text"]
    else:
        messages = row.value["conversations"] if rules.stage == "full_sft" else row.value["chosen"][:-1]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        document = json.dumps(
            messages[: answers[0]] if answers and rules.stage == "full_sft" else messages, ensure_ascii=False
        )
    # a lone surrogate (in a field that is not checked, such as a name) has no UTF-8
    return xxhash.xxh3_64_intdigest(document.encode(errors="surrogatepass")) < rules.val_fraction * 2**64
