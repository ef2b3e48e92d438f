"""Training a tokenizer: the sample it takes, and a folder that works as the shipped one does."""

import gzip
import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import zstandard
from transformers import AutoTokenizer

from dataset.tokenizer import CONTROL_TOKENS, DEFAULT_TOKENIZER, load_tokenizer
from scripts.train_tokenizer import WORD, derive_merges, main, parse_arguments, read_documents, sample
from tests.helpers import ROOT

ENGLISH = ["the", "of", "and", "to", "in", "that", "he", "was", "with", "for", "his", "as", "on", "at", "by"]
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"


def write_rows(folder: Path) -> list[str]:
    """Two files of made-up documents, one of them compressed."""
    draw = random.Random(0)
    english = [" ".join(draw.choices(ENGLISH, k=60)) + ".\n\n\tnext(x)\n" for _ in range(200)]
    chinese = ["".join(draw.choices(CHINESE, k=60)) + "，但是。\n" for _ in range(200)]
    (folder / "en.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in english))
    with gzip.open(folder / "zh.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in chinese))
    return [str(folder / "en.jsonl"), str(folder / "zh.jsonl.gz")]


def test_a_trained_folder_works_and_is_the_same_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_path", *write_rows(tmp_path), "--vocab_size", "450", "--held_out", "0.1"]
    for name in ("one", "two"):
        main([*flags, "--out_dir", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in DEFAULT_TOKENIZER.iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ours, theirs = load_tokenizer(tmp_path / "one"), AutoTokenizer.from_pretrained(str(tmp_path / "one"))
    assert ours.vocab_size == len(theirs) == 450
    text = " the and  天地\n\n\tthe。\r\n"
    assert ours.decode(ours.encode(text)) == text
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("en.jsonl", "zh.jsonl.gz", "all Chinese", "all other"))


def test_the_sample_keeps_its_bounds(tmp_path: Path) -> None:
    paths = write_rows(tmp_path)
    flags = ["--max_bytes", "20000", "--chinese_share", "0.25", "--held_out", "0.1", "--out_dir", "x"]
    options = parse_arguments(["--data_path", *paths, *flags])
    files = {path: read_documents(path) for path in paths}
    chosen = sample(files, options)
    chinese = sum(document.size for document in chosen if document.chinese)
    other = sum(document.size for document in chosen if not document.chinese)
    assert 4500 < chinese <= 5000 and 14000 < other <= 15000
    assert min(document.order for document in chosen) >= 0.1
    assert chosen == sample(dict(reversed(files.items())), options)


def test_one_file_cannot_give_more_than_its_cap(tmp_path: Path) -> None:
    paths = write_rows(tmp_path)
    options = parse_arguments(["--data_path", *paths, "--out_dir", "x", "--max_bytes_per_file", "3000"])
    assert sum(document.size for document in sample({p: read_documents(p) for p in paths}, options)) <= 6000


def test_words_lose_nothing_and_stop_where_they_should() -> None:
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert "".join(WORD.findall(everything)) == everything
    assert WORD.findall("I don't,\n\n (see_it) 12") == [
        "I",
        " don",
        "'t",
        ",\n\n",
        " (",
        "see",
        "_it",
        ")",
        " ",
        "1",
        "2",
    ]
    assert WORD.findall("他说，但是。\n") == ["他说", "，但是", "。\n"]


def test_merges_are_all_ways_to_join_two_pieces() -> None:
    pieces = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "aa", "aaa", "ab", "a", "b"]
    assert derive_merges(pieces) == [("a", "a"), ("a", "aa"), ("aa", "a"), ("a", "b")]


def test_files_are_read_as_training_reads_them(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"
    plain.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert {document.text for document in read_documents(str(path))} == {"one", "two"}


def test_globs_are_read_and_a_bad_row_among_them_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    with gzip.open(tmp_path / "zh.jsonl.gz", "at") as file:
        file.write('\n{"txt": "x"}\n')
    script = str(ROOT / "scripts/train_tokenizer.py")
    argv = [script, "--data_path", str(tmp_path / "*.jsonl*"), "--out_dir", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    where = f"{tmp_path}/zh.jsonl.gz:201"
    assert end.value.code == f'error: {where}: found the keys \'txt\', expected {{"text": "..."}}'
    assert not (tmp_path / "made").exists()


def test_too_little_text_for_the_vocabulary_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two three"}\n')
    with pytest.raises(ValueError, match="give more text, or a smaller --vocab_size"):
        main(["--data_path", str(path), "--out_dir", str(tmp_path / "made"), "--held_out", "0"])
