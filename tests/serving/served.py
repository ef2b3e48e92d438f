"""Real servers for tests: models to serve, and scripts/serve.py in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataset import DEFAULT_TOKENIZER, load_tokenizer
from model import GPT, GPTConfig, save_pretrained
from tests.helpers import ROOT, environment


def make_talker(folder: Path, max_seq_len: int = 2048) -> Path:
    """A model that never ends by itself, and says anything: all tokens are as likely, but for the stop tokens."""
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=max_seq_len))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[list(tokenizer.stop_ids), 0] = -100.0
        model.model.norm.weight.fill_(0.0)
        model.model.norm.weight[0] = 1.0
    save_pretrained(model, folder)
    tokenizer.save(folder)
    return folder


class Server:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").strip("/").rpartition(":")
        return host, int(port)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name that have these labels."""
        lines = urllib.request.urlopen(f"{self.url}metrics").read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.split()[-1]) for line in found if all(each in line for each in wanted))

    def idle(self, seconds: float = 30) -> bool:
        """Whether all slots are free, now or soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.metric("seedling_active_slots") and not self.metric("seedling_waiting_answers"):
                return True
            time.sleep(0.05)
        return False

    def memory(self) -> int:
        """Bytes that the process holds."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def serving(*flags: Any) -> Iterator[Server]:
    """A server with these flags, at any free port; what it says is read to its end, and it stops in the end."""
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("listening at "):
            break
    else:
        raise AssertionError("".join(said))
    reading = threading.Thread(target=lambda: said.extend(process.stdout or ()))
    reading.start()
    try:
        yield Server(process, said[-1].split()[-1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        reading.join()
        process.stdout.close()
    assert status == 0 and not any("Traceback" in line for line in said), "".join(said)
