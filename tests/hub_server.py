"""A hub for tests: the few routes that huggingface_hub asks for, over folders of this disk, on the loopback.

    with hub(tmp_path / "hub") as url:        tmp_path / "hub/models/user/chat/config.json"   is a file of user/chat
        HF_ENDPOINT=url python train_...      tmp_path / "hub/datasets/user/texts/a.jsonl"    of a data set

What is uploaded becomes files of the same folders. `asked` holds every request, "GET /api/models/user/chat/...".
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, list[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """For processes that are to find this hub and no other."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/[^/]+", path):
            self.describe(self.server.folder / found[1] / found[2], found[3])
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(self.server.folder / ("datasets" if found[1] else "models") / found[2] / found[3])
        else:
            self.say(404, {"error": f"no route {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.say(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            (self.server.folder / "models" / json.loads(body)["organization"] / json.loads(body)["name"]).mkdir(
                parents=True, exist_ok=True
            )
            self.say(200, {"url": f"{self.server.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            self.say(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.say(200, {"files": [each | {"shouldIgnore": False} for each in files]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self.commit(self.server.folder / "models" / found[1], body)
            self.say(
                200,
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}"},
            )
        else:
            self.say(404, {"error": f"no route {self.path}"})

    def describe(self, folder: Path, what: str) -> None:
        if not folder.is_dir():
            self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": path.name}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        self.say(200, files if what == "tree" else {"id": folder.name, "sha": COMMIT, "siblings": []})

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    def commit(self, folder: Path, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = folder / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))

    def say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
