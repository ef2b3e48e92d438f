"""Every way a line or a file can be wrong is named as `path:line: found ..., expected ...`."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from dataset.records import DataError, expand_paths, form_of, read_rows
from tests.helpers import FORM_OF

GOOD = {
    "pretrain": {"text": "Once upon a time"},
    "full_sft": {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "dpo": {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
    },
}


def line(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@pytest.fixture
def read(tmp_path):
    """read(stage, bytes) -> rows of a file with these bytes."""

    def read(stage, content, name="rows.jsonl", **settings):
        (tmp_path / name).write_bytes(content)
        return list(read_rows([str(tmp_path / name)], FORM_OF[stage], **settings))

    return read


def chat(*messages) -> dict:
    return {"conversations": list(messages)}


def pair(chosen, rejected) -> dict:
    return {"chosen": chosen, "rejected": rejected}


USER, ANSWER, OTHER = GOOD["dpo"]["chosen"][0], GOOD["dpo"]["chosen"][1], GOOD["dpo"]["rejected"][1]

BAD_LINES = [
    ("pretrain", b'{"text": "Once', r"found broken JSON.*cut short, expected \{\"text\""),
    ("pretrain", b'{"text": "Once"} {"text": "more"}', "found broken JSON.*Extra data"),
    ("pretrain", b'{"text": "\xff\xfe"}', r"not UTF-8 \(byte 11 of the line, 0xff\), expected UTF-8"),
    ("pretrain", line([{"text": "a"}]), "found a list, expected .*JSON array in one file"),
    ("pretrain", b'"text"', "found a string, expected"),
    ("pretrain", b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    ("pretrain", b'{"text": "\\ud800"}', "found half a surrogate pair.*in text, expected whole characters"),
    ("pretrain", line({"text": 3}), "found a number as text, expected a string"),
    ("pretrain", line({"text": None}), "found null .*as text, expected a string"),
    ("pretrain", b'{"text": NaN}', "found a number as text"),
    ("pretrain", line({}), r"found the keys \(none\), expected"),
    ("pretrain", line({"content": "a"}), "found the keys 'content', expected"),
    ("pretrain", line(GOOD["full_sft"]), "a row for train_full_sft.py, expected .* for train_pretrain.py"),
    ("pretrain", line(GOOD["dpo"]), "a row for train_dpo.py"),
    ("full_sft", line(GOOD["pretrain"]), "a row for train_pretrain.py"),
    ("full_sft", line(GOOD["dpo"]), "a row for train_dpo.py"),
    ("full_sft", line(chat()), "found an empty list as conversations, expected a list of messages"),
    ("full_sft", line({"conversations": "Hi"}), "found a string as conversations"),
    ("full_sft", line(chat("Hi")), r"found a string as the role of conversations\[0\]"),
    ("full_sft", line(chat({"role": "human", "content": "Hi"})), "found 'human' as the role .*expected one of system"),
    ("full_sft", line(chat({"content": "Hi"})), "found None as the role"),
    ("full_sft", line(chat({"role": ["user"], "content": "Hi"})), "as the role"),
    ("full_sft", line(chat(USER, {"role": "assistant"})), r"found null .*as conversations\[1\].content"),
    ("full_sft", line(chat(USER, {"role": "assistant", "content": ["a"]})), "found a list as .*content"),
    ("full_sft", line(chat(USER | {"tools": "[{"}, ANSWER)), r"found '\[\{' as conversations\[0\].tools.*not JSON"),
    ("full_sft", line(chat(USER | {"tools": "[" * 100_000}, ANSWER)), r"conversations\[0\].tools.*not JSON"),
    ("full_sft", line(chat(USER, ANSWER | {"tool_calls": 3})), r"found a number as conversations\[1\].tool_calls"),
    ("full_sft", line(chat(USER, ANSWER | {"tool_calls": '"x"'})), "found a string as .*tool_calls"),
    ("full_sft", line(chat(USER, ANSWER | {"reasoning_content": 1})), "found a number as .*reasoning_content"),
    ("dpo", line(GOOD["pretrain"]), "a row for train_pretrain.py"),
    ("dpo", line({"chosen": [USER, ANSWER]}), "found the keys 'chosen', expected"),
    ("dpo", line(pair([USER, ANSWER], [USER | {"content": "Ho"}, OTHER])), "different prompts.*in message 0"),
    ("dpo", line(pair([USER, ANSWER], [USER, ANSWER, USER, OTHER])), "different prompts.*in message 1"),
    ("dpo", line(pair([USER], [USER])), "last message of role 'user' in chosen, expected 'assistant'"),
    ("dpo", line(pair([ANSWER], [OTHER])), "no message before the answers, expected a prompt"),
]


@pytest.mark.parametrize(("stage", "raw", "message"), BAD_LINES)
def test_a_bad_line_is_named(read, tmp_path, stage, raw, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: (.|\n)*{message}") as error:
        read(stage, line(GOOD[stage]) + b"\n\n" + raw + b"\n" + line(GOOD[stage]) + b"\n")
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:3: found ")
    assert len(str(error.value)) < 700  # the line itself may be long


@pytest.mark.parametrize(("stage", "raw", "message"), BAD_LINES)
def test_a_bad_line_is_skipped_on_request(read, stage, raw, message):
    bad: list[str] = []
    content = line(GOOD[stage]) + b"\n" + raw + b"\n" + line(GOOD[stage])
    rows = read(stage, content, on_bad_row="skip", bad_rows=bad)
    assert [row.line for row in rows] == [1, 3] and len(bad) == 1 and ":2: found" in bad[0]


@pytest.mark.parametrize("stage", list(GOOD))
def test_a_good_line_passes(read, stage):
    (row,) = read(stage, line(GOOD[stage]))
    assert row.value == GOOD[stage] and row.where.endswith("rows.jsonl:1")


def test_messages_is_another_name_for_conversations(read):
    (row,) = read("full_sft", line({"messages": GOOD["full_sft"]["conversations"]}))
    assert row.value == GOOD["full_sft"]


CONVERSATION_OF = GOOD["full_sft"]
SPELLINGS = [
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"id": 7, "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
]


@pytest.mark.parametrize("row", SPELLINGS)
def test_alpaca_and_sharegpt_rows_are_conversations(read, tmp_path, row):
    (found,) = read("full_sft", line(row))
    assert found.value == CONVERSATION_OF
    assert form_of(tmp_path / "rows.jsonl") is FORM_OF["full_sft"]


def test_all_that_an_alpaca_row_holds_is_said(read):
    row = {"system": "Be brief.", "history": [["1?", "2."]], "instruction": "Add.", "input": "2 2", "output": "4"}
    (found,) = read("full_sft", line(row))
    texts = [(message["role"], message["content"]) for message in found.value["conversations"]]
    assert texts == [
        ("system", "Be brief."), ("user", "1?"), ("assistant", "2."), ("user", "Add.\n2 2"), ("assistant", "4"),
    ]  # fmt: skip


def test_calls_of_a_sharegpt_row_are_calls(read):
    said = [("human", "Time?"), ("function_call", '{"name": "now", "arguments": {}}'), ("observation", "12"),
            ("gpt", "Noon.")]  # fmt: skip
    row = {"tools": '[{"name": "now"}]', "conversations": [{"from": who, "value": what} for who, what in said]}
    (found,) = read("full_sft", line(row))
    assert found.value["conversations"] == [
        {"role": "system", "content": "", "tools": '[{"name": "now"}]'},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": '{"name": "now", "arguments": {}}'},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Noon."},
    ]


BAD_SPELLINGS = [
    ({"instruction": "Hi", "input": 3, "output": "a"}, r"found a number as conversations\[0\].content"),
    ({"instruction": "Hi", "output": None}, r"found null .* as conversations\[1\].content"),
    ({"instruction": "Hi", "output": "a", "history": 3}, r"found a number as conversations\[0\].content"),
    ({"instruction": "Hi", "output": "a", "history": ["b"]}, r"found null .* as conversations\[1\].content"),
    ({"conversations": [{"from": "bing", "value": "Hi"}]}, "found 'bing' as the role of .*expected one of system"),
    ({"conversations": [{"from": ["x"], "value": "Hi"}]}, "as the role"),
    ({"conversations": [{"from": "human"}, "b"]}, r"found null .* as conversations\[0\].content"),
    ({"conversations": [{"from": "function_call", "value": "now()"}]}, "tool_calls, which is not JSON"),
]


@pytest.mark.parametrize(("row", "message"), BAD_SPELLINGS)
def test_what_is_wrong_in_an_alpaca_or_sharegpt_row_is_named(read, row, message):
    with pytest.raises(DataError, match=message):
        read("full_sft", line(row))


def test_an_alpaca_row_is_no_text(read):
    with pytest.raises(DataError, match="found the keys 'instruction', 'output': a row for train_full_sft.py"):
        read("pretrain", line({"instruction": "Hi", "output": "Hello"}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my rows.json", json.dumps([GOOD["full_sft"]] * 2, indent=2)),
        ("rows.json", json.dumps([GOOD["full_sft"]] * 2)),
        ("rows.csv", '\ufeffinstruction,output\n"Hi","Hello"\n"Hi",Hello\n'),
    ],
)
def test_a_file_that_is_no_jsonl_is_answered_with_the_line_that_makes_it_one(read, tmp_path, name, content):
    with pytest.raises(DataError, match=rf"{name}:1: found .*in one file\? this writes one object a line: ") as error:
        read("full_sft", content.encode(), name)
    command = str(error.value).partition("one object a line: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    made = (tmp_path / f"{Path(name).stem}.jsonl").read_bytes()
    assert [row.value for row in read("full_sft", made)] == [CONVERSATION_OF] * 2


def test_null_content_beside_tool_calls_is_empty_content(read):
    call = {"role": "assistant", "content": None, "tool_calls": '[{"name": "now", "arguments": {}}]'}
    (row,) = read("full_sft", line(chat(USER, call)))
    assert row.value["conversations"][1]["content"] == ""


def test_byte_order_mark_crlf_blank_lines_and_no_last_newline(read):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r"}\r\n{"text": "c"}'
    rows = read("pretrain", content)
    assert [(row.line, row.value["text"]) for row in rows] == [(1, "a"), (4, "b\r"), (5, "c")]


def test_only_a_line_feed_ends_a_line(read):
    text = "a\u2028b\u0085c\x0bd"
    (row,) = read("pretrain", line({"text": text}))
    assert row.value["text"] == text


def test_a_row_of_3_megabytes(read):
    text = "0123456789" * 300_000
    assert [row.value["text"] for row in read("pretrain", line({"text": text}) + b"\n" + line({"text": "b"}))] == [
        text,
        "b",
    ]


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_an_empty_file_is_named(read, content, on_bad_row):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: found an empty file, expected rows like"):
        read("pretrain", content, on_bad_row=on_bad_row)


PACKERS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.mark.parametrize("kind", list(PACKERS))
def test_compressed_files_of_one_or_more_frames(read, kind):
    content = PACKERS[kind](b'{"text": "a"}\n{"te') + PACKERS[kind](b'xt": "b"}\n')
    assert [row.value["text"] for row in read("pretrain", content, f"rows.jsonl.{kind}")] == ["a", "b"]


@pytest.mark.parametrize("kind", list(PACKERS))
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_compressed_file_cut_short_is_named(read, kind, on_bad_row):
    """Wherever the cut falls, never fewer rows in silence."""
    packed = PACKERS[kind](b"".join(line({"text": os.urandom(50).hex()}) + b"\n" for _ in range(3000)))
    for kept in (len(packed) // 2, len(packed) - 5, len(packed) - 1):
        with pytest.raises(DataError, match=rf"rows\.jsonl\.{kind}:\d+: found damaged compressed data"):
            read("pretrain", packed[:kept], f"rows.jsonl.{kind}", on_bad_row=on_bad_row)


@pytest.mark.parametrize("kind", list(PACKERS))
def test_a_damaged_compressed_file_is_named(read, kind):
    packed = bytearray(PACKERS[kind](line({"text": os.urandom(4000).hex()})))
    for place in (0, len(packed) // 2, len(packed) - 3):
        damaged = packed.copy()
        damaged[place] ^= 0xFF
        with pytest.raises(DataError, match=rf"rows\.jsonl\.{kind}:\d+: found"):
            read("pretrain", bytes(damaged), f"rows.jsonl.{kind}")


def test_a_gzip_block_that_cannot_be_is_named(read):
    packed = bytearray(gzip.compress(line({"text": "a"})))
    packed[10] = 0x07  # a reserved block type
    with pytest.raises(DataError, match=r":1: found damaged compressed data"):
        read("pretrain", bytes(packed), "rows.jsonl.gz")


def test_files_come_in_order_and_globs_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(line({"text": name}))
    (tmp_path / "d.jsonl").mkdir()
    paths = expand_paths([tmp_path / "c.txt", str(tmp_path / "*.jsonl"), tmp_path / "a.jsonl"])
    assert [row.value["text"] for row in read_rows(paths, FORM_OF["pretrain"])] == ["c.txt", "a.jsonl", "b.jsonl"]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path):
    (tmp_path / "rows[1].jsonl").write_bytes(b"")
    assert expand_paths(str(tmp_path / "rows[1].jsonl")) == [str(tmp_path / "rows[1].jsonl")]


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        expand_paths(str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"\*.jsonl: no such file"):
        expand_paths(str(tmp_path / "*.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"is a folder; give its files, for example --data_path '.*/\*.jsonl'"):
        expand_paths(tmp_path)
    with pytest.raises(FileNotFoundError, match="--data_path"):
        expand_paths([])


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_real_files_pass(data_dir, stage):
    paths = expand_paths(str(data_dir / stage / "*.jsonl"))
    smallest = sorted(paths, key=os.path.getsize)[:3]
    assert sum(1 for _ in read_rows(smallest, FORM_OF["full_sft" if stage == "sft" else stage])) > 100
