"""Downloads by real processes from a server on this machine that speaks the few routes of both hubs."""

import hashlib
import json
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from tests.helpers import ROOT, environment

BYTES = random.Random(0).randbytes
LARGE = BYTES(12 * 2**20)  # more than is written to the disk at a time
FILES = {"dpo.jsonl": b'{"chosen": []}\n' * 5000, "rlaif.jsonl": BYTES(70_000), "more/large.jsonl": LARGE}
SMALL = {"README.md": b"small files have git's hash\n"}
REPO = "jingyaogong/minimind_dataset"


class Hub(ThreadingHTTPServer):
    """Serves FILES as Hugging Face and as ModelScope do. What it is to do wrong is set by a test."""

    cut_after: int | None = None  # bytes of a body after which it hangs up, once
    stall_after: int | None = None  # bytes after which it sends nothing more
    flip: str = ""  # file of which a bit is wrong
    claimed: int | None = None  # size of every file, as listed

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []  # of every body that was asked for
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == f"/api/datasets/{REPO}/tree/main":
            self.json([huggingface_entry(name, data, self.server.claimed) for name, data in (FILES | SMALL).items()])
        elif found := re.fullmatch(rf"/datasets/{REPO}/resolve/main/(.+)", url.path):
            self.body(found[1])
        elif url.path == "/api/v1/datasets/gongjy/minimind_dataset/repo/tree":
            found = [modelscope_entry(name, data) for name, data in FILES.items()] if query["PageNumber"] == "1" else []
            self.json({"Code": 200, "Data": {"Files": found}})
        elif url.path == "/api/v1/datasets/gongjy/minimind_dataset/repo" and query["Revision"] == "master":
            self.body(query["FilePath"])
        elif url.path.startswith("/api/v1/"):
            self.json({"Code": 10010205001, "Message": "record not found", "Data": None})
        else:
            self.send_error(404)

    def json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self, name):
        data, server, asked = (FILES | SMALL)[name], self.server, self.headers["Range"]
        server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if server.flip == name:
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        end = server.cut_after or server.stall_after or len(data)
        self.wfile.write(data[start:end])
        if server.stall_after:
            time.sleep(60)
        server.cut_after = None


def huggingface_entry(name: str, data: bytes, claimed: int | None) -> dict:
    size = claimed or len(data)
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": size, "oid": git}
    if name in FILES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
    return entry


def modelscope_entry(name: str, data: bytes) -> dict:
    return {"Path": name, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(), "Type": "blob"}


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    server.server_close()


def begin(hub: Hub, into: Path, *flags: str, **more) -> subprocess.Popen:
    env = environment(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, MODELSCOPE_ENDPOINT=hub.url, HF_HOME=str(into / "home"))
    line = [sys.executable, str(ROOT / "scripts/download_data.py"), "--into", str(into), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=env, **pipes, **more)


def download(hub: Hub, into: Path, *flags: str, **more) -> tuple[int, str, str]:
    process = begin(hub, into, *flags, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def left(into: Path) -> dict[str, bytes]:
    return {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*.*") if path.is_file()}


def test_what_is_known_is_listed_with_sizes_and_licences():
    line = [sys.executable, str(ROOT / "scripts/download_data.py")]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert re.search(r"pretrain_t2t_mini.jsonl +1.2 GB +pretrain", said) and "CC-BY-NC-2.0" in said


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_files_come_from_either_hub_and_a_cut_connection_is_gone_on_with(hub, tmp_path, source):
    hub.cut_after = 11 * 2**20
    flags = ["--name", "minimind", "--file", "more/large.jsonl", "rlaif.jsonl", "--source", source]
    status, out, err = download(hub, tmp_path, *flags)
    assert status == 0, err
    assert left(tmp_path) == {name: FILES[name] for name in ("more/large.jsonl", "rlaif.jsonl")}
    assert "2 files, 12.7MB" in out and out.count("size and hash are the hub's") == 2
    assert hub.ranges == [None, f"bytes={10 * 2**20}-", None]  # the library writes so much at a time
    hub.ranges.clear()
    assert download(hub, tmp_path, *flags)[0] == 0 and hub.ranges == []  # it is all there


def test_a_killed_download_goes_on_where_it_was(hub, tmp_path):
    hub.stall_after = 11 * 2**20
    flags = ["--repo", REPO, "--file", "more/large.jsonl"]
    process = begin(hub, tmp_path, *flags)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("*.part")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = tmp_path.rglob("*.part")
    kept, hub.stall_after = part.stat().st_size, None
    assert 2**20 < kept < len(LARGE)
    status, out, err = download(hub, tmp_path, *flags)
    assert status == 0, err
    assert hub.ranges[-1] == f"bytes={kept}-" and left(tmp_path) == {"more/large.jsonl": LARGE}
    assert "licence: on its page" in out


def test_a_flipped_bit_is_found_and_the_next_try_begins_anew(hub, tmp_path):
    hub.flip = "dpo.jsonl"
    status, _, err = download(hub, tmp_path, "--name", "minimind", "--file", "dpo.jsonl")
    assert status == 2 and "another hash than the hub lists" in err and left(tmp_path) == {}
    hub.flip = ""
    assert download(hub, tmp_path, "--name", "minimind", "--file", "dpo.jsonl")[0] == 0
    (tmp_path / "dpo.jsonl").write_bytes(b"mine\n")
    status, _, err = download(hub, tmp_path, "--name", "minimind", "--file", "dpo.jsonl")
    assert status == 2 and "is not what the hub has" in err and left(tmp_path) == {"dpo.jsonl": b"mine\n"}


def test_what_the_disk_has_no_room_for_is_not_begun(hub, tmp_path):
    hub.claimed = 10**16
    status, _, err = download(hub, tmp_path, "--name", "minimind", "--file", "dpo.jsonl", "rlaif.jsonl")
    assert status == 2 and re.search(r"20\.0PB to fetch, [\d.]+[GT]B free on its disk", err), err
    assert hub.ranges == [] and left(tmp_path) == {}


def test_a_disk_that_fills_up_meanwhile_costs_nothing_that_came(hub, tmp_path):
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # noqa: E731
    flags = ["--name", "minimind", "--file", "rlaif.jsonl"]
    status, _, err = download(hub, tmp_path, *flags, preexec_fn=full)
    assert status == 2 and err.splitlines()[-1].startswith("error: ")
    assert download(hub, tmp_path, *flags)[0] == 0 and left(tmp_path) == {"rlaif.jsonl": FILES["rlaif.jsonl"]}


def test_small_files_are_checked_and_unknown_names_are_one_line(hub, tmp_path):
    assert download(hub, tmp_path, "--repo", REPO, "--file", "README.md")[0] == 0
    assert left(tmp_path) == SMALL
    status, _, err = download(hub, tmp_path, "--repo", REPO, "--file", "sft_512.jsonl")
    assert status == 2 and "has no sft_512.jsonl; it has dpo.jsonl, rlaif.jsonl, more/large.jsonl, README.md" in err
    status, _, err = download(hub, tmp_path, "--repo", "no/body", "--file", "x")
    assert status == 2 and err.startswith("error: ") and "404" in err and err.count("\n") == 1
    status, _, err = download(hub, tmp_path, "--repo", "no/body", "--file", "x", "--source", "modelscope")
    assert status == 2 and "record not found" in err and err.count("\n") == 1
