"""A small server: one slot, one place to wait, a key; and what a stop lets come to its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from dataset import load_tokenizer
from model import load_pretrained
from scripts.serve import main, parse
from serving.app import create_app
from serving.engine import Served
from serving.guard import Limits
from tests.helpers import ROOT, environment
from tests.serving.served import Server, make_talker, serving

KEY = "a key"
LONG = {"model": "talker", "prompt": "So", "stream": True, "max_tokens": 2000}


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["scripts/serve.py", "--model", "x"], "fastapi", "serve"),
        (["scripts/convert.py", "{model}", "--to", "gguf", "--out", "{model}.gguf"], "gguf", "export"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, command, package, extra):
    blocked = tmp_path / "blocked" / f"{package}.py"
    blocked.parent.mkdir()
    blocked.write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    model = make_talker(tmp_path / "talker", max_seq_len=16)
    words = [word.format(model=model) for word in command]
    path = os.pathsep.join([str(blocked.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert package in done.stderr and f'pip install -e ".[{extra}]"' in done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = make_talker(tmp_path_factory.mktemp("models") / "talker")
    flags = ["--slots", 1, "--max_waiting", 1, "--max_body_bytes", 2000, "--context", 1500, "--threads", 1]
    with serving("--model", folder, "--api_key", KEY, *flags) as found:
        yield found


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found


def test_without_the_key_only_the_page_and_health_are_told(server):
    for path, status in (("", 200), ("page/page.css", 200), ("health", 200), ("v1/models", 401), ("metrics", 401)):
        assert httpx.get(server.url + path).status_code == status
    refused = httpx.post(server.url + "render", json={"text": "a"}, headers={"Authorization": "Bearer other"})
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError, match="found another key"):
        openai.OpenAI(base_url=f"{server.url}v1", api_key="other").models.list()
    assert openai.OpenAI(base_url=f"{server.url}v1", api_key=KEY).models.list().data[0].id == "talker"


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(client):
    body = b'{"model": "talker", "prompt": "' + b"x" * 3000 + b'"}'
    for content in (body, iter([body[:1000], body[1000:]])):
        refused = client.post("v1/completions", content=content)
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"


def test_who_finds_the_queue_full_is_told_to_come_back(client, server):
    with client.stream("POST", "v1/completions", json=LONG) as running:
        lines = running.iter_lines()
        next(lines)
        short = LONG | {"max_tokens": 1, "stream": False}
        waiting = threading.Thread(target=lambda: client.post("v1/completions", json=short))
        waiting.start()
        while 'seedling_waiting_answers{model="talker"} 1.0' not in client.get("metrics").text:
            time.sleep(0.01)
        refused = client.post("v1/completions", json=LONG)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    waiting.join(30)  # it had the slot as soon as the first was gone
    assert not waiting.is_alive()


def test_an_answer_that_takes_too_long_is_ended_and_told(tmp_path):
    folder = make_talker(tmp_path / "talker", max_seq_len=20_000)
    served = Served("talker", load_pretrained(folder), load_tokenizer(folder), chat=True)
    with TestClient(create_app([served], slots=1, limits=Limits(seconds=0.3)), "http://localhost") as client:
        late = client.post("v1/completions", json=LONG | {"stream": False, "max_tokens": 19_000})
        assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
        with client.stream("POST", "v1/completions", json=LONG | {"max_tokens": 19_000}) as running:
            lines = [line for line in running.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["code"] == "timeout"
        assert client.post("v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_a_stop_lets_what_runs_come_to_its_end(client, server):
    """The last test of this server."""
    lines: list[str] = []
    with client.stream("POST", "v1/completions", json=LONG | {"max_tokens": 400}) as running:
        for line in running.iter_lines():
            if not lines:
                server.process.send_signal(signal.SIGTERM)
            lines.append(line)
    assert lines[-2] == "data: [DONE]" and '"finish_reason":"length"' in lines[-4]
    assert server.process.wait(20) == 0


def test_a_server_without_a_key_answers_to_no_other_name(tmp_path):
    folder = make_talker(tmp_path / "talker")
    served = Served("talker", load_pretrained(folder), load_tokenizer(folder), chat=True)
    with TestClient(create_app([served], slots=1), "http://localhost") as client:
        for host, status in (("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("a.example:8000", 403), ("[", 403)):
            assert client.get("v1/models", headers={"Host": host}).status_code == status


def test_others_are_not_let_in_without_a_key():
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match="give --api_key"):
            parse(["--model", "x", "--host", host])
        assert parse(["--model", "x", "--host", host, "--api_key", "k"]).host == host
    for host in ("127.0.0.1", "localhost", "::1"):
        assert parse(["--model", "x", "--host", host]).host == host


def test_what_cannot_be_served_is_told_in_a_line(tmp_path, capsys):
    assert main(["--model", "x", "--slot", "3"]) == 2
    assert main(["--model", str(tmp_path / "nothing")]) == 2
    folder = make_talker(tmp_path / "talker")
    assert main(["--model", str(folder), f"other/={folder}", str(folder)]) == 2
    assert main(["--model", str(folder), "--slots", str(10**9)]) == 2
    told = capsys.readouterr().err.splitlines()
    expected = ["did you mean --slots?", "nothing: no such folder", "two of the name talker", "fewer --slots"]
    assert len(told) == 4 and all(part in line for part, line in zip(expected, told, strict=True)), told


@pytest.mark.parametrize("flags", [["--slots", "0"], ["--context", "-1"], ["--max_waiting", "-1"], ["--threads", "0"]])
def test_flags_out_of_range_are_refused(flags: list[Any]):
    with pytest.raises(ValueError, match=flags[0]):
        parse(["--model", "x", *flags])
