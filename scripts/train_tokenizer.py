"""Train a tokenizer from pretraining rows and write every file a tokenizer folder holds.

    python scripts/train_tokenizer.py --data_path my_en.jsonl my_zh.jsonl --out_dir my_tokenizer

    {"text": "Once upon a time ..."}  ->  hash of the text: 2 in 100 documents are held out
                                      ->  a sample of the others: Chinese and other text balanced, files too
                                      ->  SentencePiece BPE  ->  tokenizer.model
                                      ->  the same pieces and merges for Hugging Face  ->  tokenizer.json, ...
                                      ->  a table: characters a token on the held-out documents

The same files and flags give the same tokenizer, bit for bit.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, processors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.forms import TEXT
from dataset.records import expand_paths, one_line, read_rows
from dataset.tokenizer import CONTROL_TOKENS, DEFAULT_TOKENIZER, SPACE_MARK, Tokenizer

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
CHINESE_FROM = 0.2  # a document with at least this share of Han characters counts as Chinese
CHUNK = 4000  # characters a training sentence
WORD_END = "\x1f"  # stands between words in the training sentences alone
WORD = re.compile(
    r"(?:[^\w\r\n]|_)?[^\W\d_]+"  # letters, with one space or sign before them
    r"|\d"
    r"| ?(?:[^\w\s]|_)+[\r\n]*"  # signs, with the space before and the newlines after them
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What a piece may span at most, as GPT-4 splits: "，但是" and " the" may be pieces, "the." and "是，" not."""


class Document(NamedTuple):
    """One text and what sampling needs: `order` lies evenly in [0, 1) and depends on the text alone."""

    text: str
    size: int
    order: float
    chinese: bool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path",
        nargs="+",
        required=True,
        help='files or globs of {"text": ...} rows (.jsonl, .jsonl.gz, .jsonl.zst)',
    )
    parser.add_argument("--out_dir", required=True, help="folder to write the tokenizer's files to")
    parser.add_argument("--vocab_size", type=int, default=6400, help="pieces, control tokens and bytes included [6400]")
    parser.add_argument(
        "--character_coverage", type=float, default=0.988, help="characters with a piece; others are bytes [0.988]"
    )
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="UTF-8 bytes to train on [20 MB]")
    parser.add_argument("--max_bytes_per_file", type=int, default=3_000_000, help="most that one file may give [3 MB]")
    parser.add_argument("--chinese_share", type=float, default=0.5, help="share of the bytes that is Chinese [0.5]")
    parser.add_argument("--max_piece_length", type=int, default=16, help="characters in the longest piece [16]")
    parser.add_argument("--held_out", type=float, default=0.02, help="share of documents kept for measuring [0.02]")
    return parser.parse_args(arguments)


def read_documents(path: str) -> list[Document]:
    """All documents of a file, in an order that depends on their texts alone. Raises DataError for a bad row."""
    documents = [_document(row.value["text"]) for row in read_rows([path], TEXT)]
    return sorted(documents, key=lambda document: document.order)


def _document(text: str) -> Document:
    encoded = text.encode("utf-8")
    order = int.from_bytes(hashlib.sha256(encoded).digest()[:7], "big") / 256**7
    chinese = len(HAN.findall(text)) >= CHINESE_FROM * max(1, len(text))
    return Document(text, len(encoded), order, chinese)


def sample(files: dict[str, list[Document]], options: argparse.Namespace) -> list[Document]:
    """Training documents: `max_bytes`, `chinese_share` of it Chinese, as even over the files as they allow."""
    chosen: list[Document] = []
    for chinese, share in ((True, options.chinese_share), (False, 1 - options.chinese_share)):
        parts = [
            [d for d in documents if d.chinese == chinese and d.order >= options.held_out]
            for documents in files.values()
        ]
        budget = options.max_bytes * share
        # Smallest files first: what they cannot use goes to the larger ones.
        parts.sort(key=lambda part: sum(d.size for d in part))
        for i, part in enumerate(parts):
            taken = _take(part, min(budget / (len(parts) - i), options.max_bytes_per_file))
            chosen += taken
            budget -= sum(d.size for d in taken)
    return sorted(chosen, key=lambda document: document.order)


def _take(documents: list[Document], size: float) -> list[Document]:
    taken = []
    for document in documents:
        if document.size <= size:
            taken.append(document)
            size -= document.size
    return taken


def train_model(texts: Iterable[str], options: argparse.Namespace) -> bytes:
    """A serialised SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=options.vocab_size,
        character_coverage=options.character_coverage,
        max_sentencepiece_length=options.max_piece_length,
        split_by_unicode_script=False,  # WORD decides instead
        pretokenization_delimiter=WORD_END,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        # Text must come back exactly, so nothing is normalised, added or removed.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=list(CONTROL_TOKENS[4:]),
        max_sentence_length=CHUNK * 5,  # bytes: four a character, one a delimiter
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def training_sentences(documents: Iterable[Document]) -> Iterator[str]:
    """Documents in pieces short enough for the trainer, newlines and all, their words marked off."""
    for document in documents:
        for start in range(0, len(document.text), CHUNK):
            yield WORD_END.join(WORD.findall(document.text[start : start + CHUNK]))


def write_folder(model: bytes, folder: Path) -> None:
    """Write tokenizer.model, its Hugging Face twin and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    template = DEFAULT_TOKENIZER / "chat_template.jinja"
    if folder.resolve() != DEFAULT_TOKENIZER.resolve():
        shutil.copyfile(template, folder / template.name)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    hugging_face_tokenizer(processor).save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(CONTROL_TOKENS[4:]),
    }
    _write_json(folder / "special_tokens_map.json", special)
    # The class that reads tokenizer.json as it stands; a named class would rebuild it in its own way.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hugging_face_tokenizer(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library: equal ids for all text without control tokens' names.

    The vocabulary holds real spaces where SentencePiece has U+2581, so nothing needs to be normalised and a
    literal U+2581 falls back to its bytes by itself.
    """
    pieces = [model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(vocab=vocabulary, merges=derive_merges(pieces), byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", CONTROL_TOKENS.index("<s>"))]
    )
    return tokenizer


def derive_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order of the third: SentencePiece's own priority."""
    first = len(CONTROL_TOKENS) + 256
    known = set(pieces[first:])
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces[first:]
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def measure(tokenizer: Tokenizer, files: dict[str, list[Document]], held_out: float) -> dict[str, tuple[int, int]]:
    """(characters, tokens) of the held-out documents: by file, then by language."""
    totals: dict[str, tuple[int, int]] = {}
    for path, documents in files.items():
        for document in documents:
            if document.order < held_out:
                tokens = len(tokenizer.encode(document.text))
                for name in (Path(path).name, "all Chinese" if document.chinese else "all other"):
                    characters, before = totals.get(name, (0, 0))
                    totals[name] = (characters + len(document.text), before + tokens)
    return dict(sorted(totals.items(), key=lambda item: item[0].startswith("all ")))


def main(arguments: list[str] | None = None) -> None:
    """Read, sample, train, write, measure."""
    options = parse_arguments(arguments)
    files = {path: read_documents(path) for path in expand_paths(options.data_path)}
    documents = sample(files, options)
    size, chinese = sum(d.size for d in documents), sum(d.size for d in documents if d.chinese)
    print(f"training on {len(documents):,} documents, {size:,} bytes, {chinese:,} of them Chinese")
    try:
        model = train_model(training_sentences(documents), options)
    except RuntimeError as error:
        raise ValueError(f"{error}; give more text, or a smaller --vocab_size") from None
    write_folder(model, Path(options.out_dir))
    print(f"{'held-out documents of':32}{'characters':>12}{'tokens':>12}{'characters a token':>20}")
    for name, (characters, tokens) in measure(Tokenizer(options.out_dir), files, options.held_out).items():
        print(f"{name:32}{characters:12,}{tokens:12,}{characters / tokens:20.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
