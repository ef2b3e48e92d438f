"""eval_model.py as a user meets it, on a model that knows a few conversations by heart."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_model
from dataset import DEFAULT_TOKENIZER, load_tokenizer, render_chat
from model import GPT, GPTConfig, generate, load_pretrained, save_pretrained
from serving import Session
from tests.dataset.foreign import CHATML, make_foreign_folder
from tests.helpers import ROOT
from tests.memorised import CALL, CONVERSATIONS, make_memorised, user
from training import PretrainConfig
from training.config import save_config

GREEDY = {"max_new_tokens": 40, "temperature": 0.0}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An out_dir with full_sft_48."""
    folder = tmp_path_factory.mktemp("out")
    make_memorised(folder / "full_sft_48")
    return folder


@pytest.fixture
def session(out: Path) -> Session:
    folder = out / "full_sft_48"
    return Session(load_pretrained(folder), load_tokenizer(folder), GREEDY, notice=eval_model.tell)


def copy(source: Path, target: Path, age: float = 0.0) -> None:
    """Copy a model folder; its weights are `age` seconds old."""
    shutil.copytree(source, target)
    os.utime(target / "model.safetensors", (time.time() - age,) * 2)


def run(capsys, *flags, stdin: str = "", monkeypatch=None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of main()."""
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    status = eval_model.main([str(flag) for flag in flags])
    return status, *capsys.readouterr()


# Which model ----------------------------------------------------------------------------------------------------


def test_the_newest_folder_of_the_stage_is_opened(out, tmp_path, capsys):
    copy(out / "full_sft_48", tmp_path / "full_sft_48", age=10)
    copy(out / "full_sft_48", tmp_path / "full_sft_64", age=5)
    copy(out / "full_sft_48", tmp_path / "dpo_48")
    copy(out / "full_sft_48", tmp_path / "full_sft_48_backup")  # not the name of a run folder
    flags = ["--out_dir", tmp_path, "--prompt", "Who are you?"]
    assert f"{tmp_path}/full_sft_64: " in run(capsys, *flags)[2]
    assert f"{tmp_path}/full_sft_48: " in run(capsys, *flags, "--dim", 48)[2]
    assert f"{tmp_path}/dpo_48: " in run(capsys, *flags, "--model_mode", 2)[2]
    assert f"{tmp_path}/full_sft_48_backup: " in run(capsys, *flags, "--model", tmp_path / "full_sft_48_backup")[2]


def test_a_run_is_opened_by_its_name_and_listed_where_another_is_missing(out, tmp_path, capsys):
    copy(out / "full_sft_48", tmp_path / "wide")
    copy(out / "full_sft_48", tmp_path / "wide/best")
    flags = ["--out_dir", tmp_path, "--prompt", "Who are you?"]
    assert f"{tmp_path}/wide: " in run(capsys, *flags, "--model", "wide")[2]
    assert f"{tmp_path}/wide/best: " in run(capsys, *flags, "--model", "wide/best")[2]
    assert f"models in {tmp_path}: wide)" in run(capsys, *flags)[2]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model_mode", 2], ["dpo_*", "train_dpo.py", "full_sft_48", "--model FOLDER"]),
        (["--model_mode", 0, "--dim", 768], ["pretrain_768", "train_pretrain.py --dim 768"]),
        (["--dim", 768], ["full_sft_768", "train_full_sft.py --dim 768"]),
        (["--n_layers", 16, "--dim", 48], ["--n_layers 16 contradicts", "has n_layers 2"]),
        (["--model", "nowhere"], ["nowhere", "config.json"]),
        (["--max_new_token", 3], ["unknown flag --max_new_token", "--max_new_tokens"]),
        (["--model_mode", 3], ["--model_mode", "invalid choice"]),
        (["--n_layers", "many"], ["--n_layers is 'many'", "whole number"]),
        (["--temperature", -1], ["temperature is -1.0"]),
        (["--device", "cuda:99"], ["cuda"]),
        (["--json"], ["--score"]),
        (["--score", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(out, capsys, monkeypatch, flags, told):
    status, stdout, stderr = run(capsys, "--out_dir", out, *flags, monkeypatch=monkeypatch)
    assert (status, stdout) == (2, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ") and all(text in last for text in told), stderr


def test_shape_flags_that_agree_are_accepted(out, capsys):
    flags = ["--n_layers", 2, "--dim", 48, "--n_heads", 4, "--max_seq_len", 96, "--tie_embeddings", "true"]
    assert run(capsys, "--out_dir", out, *flags, "--prompt", "Who are you?", "--temperature", 0)[0] == 0


def test_import_does_nothing():
    done = subprocess.run([sys.executable, "-c", "import eval_model"], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# One answer, and pipes ------------------------------------------------------------------------------------------


def test_prompt_prints_the_answer_alone(out, capsys):
    status, stdout, stderr = run(capsys, "--out_dir", out, "--prompt", "你是谁？", "--temperature", 0)
    assert (status, stdout) == (0, "我是一颗种子。\n")
    assert "full_sft_48" in stderr


def test_piped_lines_are_the_messages_of_one_conversation(out, capsys, monkeypatch):
    stdin = "Add 2 and 3\r\n\nAdd 1\n"
    status, stdout, _ = run(capsys, "--out_dir", out, "--temperature", 0, stdin=stdin, monkeypatch=monkeypatch)
    assert (status, stdout) == (0, "<think>2+3</think>5\n6\n")


def test_a_pipe_in_a_real_process_without_a_locale(out):
    command = [sys.executable, "eval_model.py", "--model", str(out / "full_sft_48"), "--temperature", "0"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    stdin = "你是谁？\n".encode()
    done = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout.decode()) == (0, "我是一颗种子。\n"), done.stderr


def test_tool_calls_are_shown(out, capsys):
    _, stdout, _ = run(capsys, "--out_dir", out, "--prompt", "Weather in Rome?", "--temperature", 0)
    assert stdout == f"Let me look. <tool_call>{json.dumps(CALL)}</tool_call>\n"


def test_an_answer_cut_by_length_is_marked(out, capsys):
    flags = ["--out_dir", out, "--prompt", "你是谁？", "--temperature", 0, "--max_new_tokens", 3]
    _, stdout, stderr = run(capsys, *flags)
    assert "我是一颗种子。".startswith(stdout.strip("\n\ufffd")) and len(stdout) < 8
    assert "[cut: --max_new_tokens 3]" in stderr


def test_a_seed_makes_answers_repeatable(out, capsys):
    flags = ["--out_dir", out, "--prompt", "tell me", "--temperature", 3, "--top_p", 1, "--max_new_tokens", 20]
    answers = [run(capsys, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_pretrained_model_continues_text(out, tmp_path, capsys, monkeypatch):
    """The prompt is `<s>` and the text, nothing of a chat; every line starts afresh."""
    copy(out / "full_sft_48", tmp_path / "pretrain_48")
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    model = load_pretrained(tmp_path / "pretrain_48")
    ids = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    with torch.inference_mode():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    expected = tokenizer.decode(ids[-5:], skip_control=False).partition("</s>")[0].partition("<|end|>")[0]
    flags = ["--temperature", 0, "--max_new_tokens", 5]
    copy(tmp_path / "pretrain_48", tmp_path / "named")
    save_config(PretrainConfig(run_name="named"), tmp_path / "named/config.yaml")
    here = ["--out_dir", tmp_path]
    for which in (["--model_mode", 0, *here], ["--model", "named", *here], ["--raw", "--out_dir", out]):
        stdin = "Once upon a time\n" * 2
        _, stdout, _ = run(capsys, *which, *flags, stdin=stdin, monkeypatch=monkeypatch)
        assert stdout == (expected + "\n") * 2


@pytest.mark.parametrize("template", [CHATML, None])
def test_another_familys_folder_is_opened(tmp_path, capsys, template):
    """A Qwen3 with its own tokenizer: chats through its own template, continues text where there is none, is scored."""
    folder = make_foreign_folder(tmp_path / "qwen", template)
    torch.manual_seed(0)
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 128, "qk_norm": True}
    model = GPT(GPTConfig(vocab_size=259, **shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
    save_pretrained(model, folder)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" if template else "Hi"
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_template(prompt)
    (answer,) = generate(model, [ids], max_new_tokens=12, temperature=0, stop_ids=tokenizer.stop_ids)
    flags = ["--model", folder, "--temperature", 0, "--max_new_tokens", 12]
    status, stdout, _ = run(capsys, *flags, "--prompt", "Hi")
    assert (status, stdout) == (0, tokenizer.decode(answer.ids, skip_control=False) + "\n")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Hi"}\n')
    status, stdout, _ = run(capsys, *flags, "--score", texts, "--json")
    assert (status, json.loads(stdout)["tokens"]) == (0, 2)  # no <s> here: i and the end are predicted, H is not


# The conversation -----------------------------------------------------------------------------------------------


def test_no_character_is_shown_before_all_its_bytes_are_there(session):
    parts = list(session.answer("Who are you?"))
    assert "".join(parts) == "I am a seed. 🌱"
    assert "\ufffd" not in "".join(parts) and "" in parts  # something was held back


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_history_is_rendered_as_in_training(session, messages):
    """The prompt of the next turn begins with the very ids of the conversation the model was trained on."""
    for message in messages:
        if message["role"] == "user":
            list(session.answer(message["content"]))
    rendered = render_chat(session.tokenizer, messages).ids
    assert session.prompt("next")[0][: len(rendered)] == rendered


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt(session, capsys):
    session.system = "Be brief."
    for i in range(8):
        list(session.answer(f"Question number {i}, is it?"))
    assert "oldest messages are left out" in capsys.readouterr().err
    ids, start = session.prompt("Last question?")
    assert 0 < start < len(session.messages) and session.messages[start]["role"] == "user"
    head = render_chat(session.tokenizer, [{"role": "system", "content": "Be brief."}, session.messages[start]]).ids
    assert ids[: len(head)] == head
    assert len(ids) + 96 // 4 <= 96
    assert len(session.messages) == 16  # nothing is lost for /save


def test_a_message_longer_than_the_context_is_refused_and_forgotten(session):
    list(session.answer("Who are you?"))
    before = list(session.messages)
    with pytest.raises(ValueError, match=r"tokens; the context is 96: shorten"):
        list(session.answer("word " * 200))
    assert session.messages == before


def test_an_answer_stopped_halfway_is_kept(session):
    parts = session.answer("Who are you?")
    text = "".join(next(parts) for _ in range(3))
    parts.close()
    assert session.messages == [user("Who are you?"), {"role": "assistant", "content": text}]


# At a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """eval_model.py on a pseudo terminal."""

    def __init__(self, *flags, **environment):
        import pty

        self.process, self.end = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and hands that on
            command = [sys.executable, "eval_model.py", *map(str, flags)]
            os.execve(sys.executable, command, os.environ | {"TERM": "xterm"} | environment)
        self.text = ""

    def expect(self, wanted: str, seconds: float = 120.0) -> str:
        """Read until `wanted` has come; what came before it."""
        limit = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < limit, f"{wanted!r} did not come: {self.text[-500:]!r}"
            self.read()
        before, _, self.text = self.text.partition(wanted)
        return before

    def read(self) -> None:
        """What has come within a second."""
        if select.select([self.end], [], [], 1.0)[0]:
            try:
                self.text += os.read(self.end, 4096).decode("utf-8", "replace")
            except OSError:
                pytest.fail(f"it left: {self.text!r}")

    def send(self, text: str) -> None:
        os.write(self.end, text.encode())

    def status(self) -> int:
        """Exit status, once the program has left."""
        try:
            while os.read(self.end, 4096):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")


@needs_terminal
def test_chat_and_commands_at_a_terminal(out, tmp_path):
    terminal = Terminal("--out_dir", out, "--temperature", 0)
    saved = tmp_path / "chat.jsonl"
    for line, answer in [
        ("Add 2 and 3", "<think>2+3</think>5"),
        ("Add 1", "6"),
        ("/system You are kind.", "[system prompt set]"),
        (f"/save {saved}", "[appended to"),
        ("/system", "[system prompt removed]"),
        ("/reset", "[conversation forgotten]"),
        ("/save", "error: /save needs a file name, and a conversation to save"),
        ("/nothing", "error: there is no command /nothing"),
        ("/help", "Ctrl-C stops an answer"),
        ("Who are you?", "I am a seed. 🌱"),
    ]:
        terminal.expect("> ")
        terminal.send(line + "\n")
        terminal.expect(answer)
    terminal.expect("> ")
    terminal.send("/exit\n")
    assert terminal.status() == 0
    (row,) = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert row["conversations"] == [{"role": "system", "content": "You are kind."}, *CONVERSATIONS[2]]


@needs_terminal
def test_pasted_lines_are_one_message_and_any_character_can_be_typed_in_any_locale(out, tmp_path):
    terminal = Terminal("--out_dir", out, "--temperature", 0, LC_ALL="C")
    saved = tmp_path / "chat.jsonl"
    pasted = "你是谁？\nWho are you?\n\tend"
    for keys, answer in [
        ("你是谁x\x7f？\n", "我是一颗种子。"),  # one key takes back one character
        ("\x1b[200~" + pasted.replace("\n", "\r") + "\x1b[201~\r", "\n"),
        (f"/save {saved}\n", "[appended to"),
        ("/exit\n", "\n"),
    ]:
        terminal.expect("\x1b[?2004h> ")  # the terminal is asked to mark what is pasted
        terminal.send(keys)
        terminal.expect(answer)
    assert terminal.status() == 0
    (row,) = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [m["content"] for m in row["conversations"] if m["role"] == "user"] == ["你是谁？", pasted]


@needs_terminal
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tmp_path):
    folder = tmp_path / "pretrain_16"
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=100_000)), folder)
    load_tokenizer(DEFAULT_TOKENIZER).save(folder)
    terminal = Terminal("--model", folder, "--temperature", 0, "--max_new_tokens", 90_000)
    terminal.expect("> ")
    terminal.send("Once\n")
    terminal.expect("Once\r\n")
    while len(terminal.text) < 20:  # the answer has begun
        terminal.read()
    os.kill(terminal.process, signal.SIGINT)
    terminal.expect("[stopped]")
    terminal.expect("> ")
    time.sleep(1)  # readline misses a signal that comes between its prompt and its wait for a key
    os.kill(terminal.process, signal.SIGINT)
    terminal.expect("[Ctrl-D or /exit leaves]")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.status() == 0


# Scoring --------------------------------------------------------------------------------------------------------


def test_score_prints_a_table_or_json(out, tmp_path, capsys):
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    chats.write_text("".join(json.dumps({"conversations": c}) + "\n" for c in CONVERSATIONS), encoding="utf-8")
    texts.write_text('{"text": "Once upon a time"}\n', encoding="utf-8")
    flags = ["--out_dir", out, "--score", chats, texts]
    status, stdout, _ = run(capsys, *flags, "--json")
    first, second = [json.loads(line) for line in stdout.splitlines()]
    assert (status, first["exact_match"], first["form"], second["form"]) == (0, 1.0, "full_sft", "pretrain")
    status, stdout, _ = run(capsys, *flags)
    assert status == 0
    for shown in ("chats.jsonl", "texts.jsonl", "exact match", "1.0000", "bits per byte", f"{second['loss']:.4f}"):
        assert shown in stdout
