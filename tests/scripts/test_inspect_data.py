"""scripts/inspect_data.py: what it shows of rows, lengths and bad lines."""

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataset import CONVERSATION, TEXT, render_chat
from scripts.inspect_data import histogram, main, marked
from tests.helpers import ROOT
from tests.memorised import CONVERSATIONS, assistant, user

ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": "Hi\n世界"}, {"text": "one two"}],
    "full_sft": [{"conversations": [user("Hi"), assistant("Yes"), user("<|end|>"), assistant("No")]}],
    "dpo": [{"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]}],
}


def write(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def run(capsys, *flags) -> tuple[int, str]:
    status = main([str(flag) for flag in flags])
    return status, capsys.readouterr().out


def pieces(tokenizer, text: str) -> str:
    return "|".join(tokenizer.token_text(i) for i in tokenizer.encode(text))


def test_supervised_tokens_of_a_conversation_are_marked(tokenizer, tmp_path, capsys):
    status, shown = run(capsys, write(tmp_path / "sft.jsonl", ROWS["full_sft"]))
    p = {text: pieces(tokenizer, text) for text in ("Hi", "Yes", "<|end|>", "No")}
    expected = (
        f"<s>|<|user|>|{p['Hi']}|<|end|>|<|assistant|>[[{p['Yes']}|<|end|>]]"
        f"<|user|>|{p['<|end|>']}|<|end|>|<|assistant|>[[{p['No']}|<|end|>]]"
    )
    assert status == 0 and expected in shown.splitlines()
    assert p["<|end|>"].count("|") > 2  # what a user writes is not the control token
    rendered = render_chat(tokenizer, ROWS["full_sft"][0]["conversations"])
    assert f"sft.jsonl:1  {len(rendered.ids)} tokens, {sum(rendered.mask)} supervised" in shown


def test_all_of_a_text_but_its_first_token_is_supervised(tokenizer, tmp_path, capsys):
    _, shown = run(capsys, write(tmp_path / "text.jsonl.gz", ROWS["pretrain"]), "--rows", 1)
    text = pieces(tokenizer, "Hi\n世界").replace("\n", "⏎\n")
    assert f"<s>[[{text}|</s>]]" in shown
    assert "text.jsonl.gz:2" not in shown and "2 rows" in shown


def test_both_answers_of_a_pair_are_shown(tokenizer, tmp_path, capsys):
    _, shown = run(capsys, write(tmp_path / "pairs.jsonl", ROWS["dpo"]))
    for side, answer in (("chosen", "Yes"), ("rejected", "No")):
        assert f"pairs.jsonl:1  {side}, " in shown and f"{side}: 1 rows" in shown
        assert f"<|assistant|>[[{pieces(tokenizer, answer)}|<|end|>]]" in shown


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_nothing_is_shown_that_is_not_in_the_row(tokenizer, messages):
    """Without the marks, the text is what the tokens decode to."""
    ((_, ids, supervised),) = CONVERSATION.render({"conversations": messages}, tokenizer)
    text = marked(tokenizer, ids, supervised, colour=True)
    whole = tokenizer.decode(ids, skip_control=False)
    lone_bytes = any(tokenizer.token_text(i).startswith("<0x") for i in ids)
    assert text.plain == whole or lone_bytes
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == "".join(tokenizer.token_text(i) for i, mine in zip(ids, supervised, strict=True) if mine)


def test_colours_on_a_terminal_and_none_on_request(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "sft.jsonl", ROWS["full_sft"])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = run(capsys, path)[1]
    assert "\x1b[" in shown and "[[" not in shown
    assert "[[" in run(capsys, path, "--no_color")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[" in run(capsys, path)[1]


def test_a_long_row_is_shown_as_far_as_training_reads(tmp_path, capsys):
    row = {"conversations": [user("Hi"), assistant(" ".join(map(str, range(200))))]}
    _, shown = run(capsys, write(tmp_path / "sft.jsonl", [row]), "--max_seq_len", 64)
    tokens = int(shown.split("sft.jsonl:1  ")[1].split(" ")[0])
    assert f"... and {tokens - 65} tokens beyond --max_seq_len 64" in shown
    assert "1 rows are longer than --max_seq_len 64: cut" in shown
    assert "199" not in shown


def test_bad_lines_are_all_named(tmp_path, capsys):
    good = ROWS["full_sft"][0]
    lines = [
        good,
        '{"conversations": [',
        "",
        {"text": "x"},
        {"conversations": [{"role": "robot", "content": "x"}]},
        good,
    ]
    path, empty = write(tmp_path / "sft.jsonl", lines), write(tmp_path / "empty.jsonl", [])
    status, shown = run(capsys, path, empty, "--rows", 0)
    assert status == 1 and "4 bad lines:" in shown and "2 rows" in shown
    named = [line.split(": found")[0].rsplit("/")[-1] for line in shown.splitlines() if ": found" in line]
    assert named == ["sft.jsonl:2", "sft.jsonl:4", "sft.jsonl:5", "empty.jsonl:1"]


def test_a_line_that_cannot_be_rendered_is_bad(tmp_path, capsys):
    call = [user("Hi"), {"role": "assistant", "content": "", "tool_calls": '["x"]'}]
    status, shown = run(capsys, write(tmp_path / "sft.jsonl", [{"conversations": call}, ROWS["full_sft"][0]]))
    assert status == 1 and "sft.jsonl:1: " in shown and "1 bad lines:" in shown


@pytest.mark.parametrize(("flag", "form"), [("sft", "full_sft"), ("full_sft", "full_sft"), ("pretrain", "pretrain")])
def test_a_given_stage_decides_what_is_bad(tmp_path, capsys, flag, form):
    both = write(tmp_path / "both.jsonl", [ROWS["pretrain"][0], ROWS["full_sft"][0]])
    status, shown = run(capsys, both, "--stage", flag)
    bad = {"pretrain": 2, "full_sft": 1}[form]
    assert status == 1 and f"both.jsonl:{bad}: found the keys" in shown


def test_doublings_hold_every_length_once():
    lines = histogram([1, 2, 3, 4, 7, 8, 64], "", TEXT, max_seq_len=62)
    assert lines[0] == "tokens a row: 7 rows, median 4, longest 64"
    found = [(line.split("  #")[0].strip(), int(line.split()[-2])) for line in lines[1:-1]]
    assert [span for span, _ in found][:4] == ["1 - 1", "2 - 3", "4 - 7", "8 - 15"]
    assert [count for _, count in found] == [1, 2, 2, 1, 0, 0, 1]
    assert lines[2].count("#") == 40 and lines[1].count("#") == 20
    assert lines[-1].strip() == "1 rows are longer than --max_seq_len 62: split, nothing is lost"


def test_it_runs_as_a_script_from_anywhere(tmp_path, monkeypatch, capsys):
    write(tmp_path / "text.jsonl", ROWS["pretrain"])
    script = str(ROOT / "scripts" / "inspect_data.py")
    command = [sys.executable, script, "text.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and "text.jsonl:1" in done.stdout
    # a second process would only import once more
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "nowhere.jsonl"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "") and err.startswith("error: nowhere.jsonl: no such file")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, even by root")
def test_a_file_that_cannot_be_read_is_a_line_among_the_bad(tmp_path, capsys):
    good = write(tmp_path / "a.jsonl", ROWS["pretrain"])
    assert main([str(good), "/proc/self/mem"]) == 1
    assert "1 bad lines:\n/proc/self/mem: Input/output error\n" in capsys.readouterr().out
