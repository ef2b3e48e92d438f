"""How many tokens a second does the server give 1, 4, 16 or 64 clients, and how long do they wait for the first one?

    python scripts/benchmark_serving.py                                 dim 512, 8 layers, random weights
    python scripts/benchmark_serving.py --url http://127.0.0.1:8000     a server that runs already: its first model

Every client streams one answer after another over a connection of its own, each to a prompt of random tokens that no
other has. Clients share the machine with the server, so they do as little as they can: sockets, and no HTTP library.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Found:
    """Of all clients together. Times in seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)  # from a request to its first token
    gaps: list[float] = field(default_factory=list)  # between two tokens of an answer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs; without it one is started")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="at a time [1 4 16 64]")
    parser.add_argument("--answers", type=int, default=4, help="of each client [4]")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="[64]")
    parser.add_argument("--new_tokens", type=int, default=128, help="[128]")
    parser.add_argument("--dim", type=int, default=512, help="of the model that is made [512]")
    parser.add_argument("--n_layers", type=int, default=8, help="[8]")
    arguments, server_flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        started = contextmanager(lambda: iter([arguments.url])) if arguments.url else None
        with started() if started else server(make_model(Path(folder), arguments), server_flags) as url:
            report(url.rstrip("/"), arguments)


def make_model(folder: Path, arguments: argparse.Namespace) -> Path:
    import torch

    from dataset import DEFAULT_TOKENIZER, load_tokenizer
    from model import GPT, GPTConfig, save_pretrained

    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig(dim=arguments.dim, n_layers=arguments.n_layers)), folder / "random")
    load_tokenizer(DEFAULT_TOKENIZER).save(folder / "random")
    return folder / "random"


@contextmanager
def server(folder: Path, flags: list[str]) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--model", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("listening at "))
        yield told.split()[-1]
    finally:
        process.terminate()
        process.wait()


def report(url: str, arguments: argparse.Namespace) -> None:
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    print("clients  tokens/s  ratio  first token p50, p95 (ms)  between tokens p50, p95 (ms)")
    asyncio.run(load(url, model, 1, 1, arguments))  # what is made at the first use
    alone = None
    for clients in arguments.clients:
        began = time.perf_counter()
        found = asyncio.run(load(url, model, clients, arguments.answers, arguments))
        rate = found.tokens / (time.perf_counter() - began)
        alone = alone or rate
        first, gaps = (
            f"{quantile(x, 0.5) * 1e3:9.1f} {quantile(x, 0.95) * 1e3:9.1f}" for x in (found.first, found.gaps)
        )
        print(f"{clients:7d} {rate:9.0f} {rate / alone:6.2f} {first:>26} {gaps:>29}", flush=True)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(url: str, model: str, clients: int, answers: int, arguments: argparse.Namespace) -> Found:
    found = Found()
    await asyncio.gather(*(client(url, model, answers, arguments, found, seed) for seed in range(clients)))
    return found


async def client(url: str, model: str, answers: int, arguments: argparse.Namespace, found: Found, seed: int) -> None:
    host, _, port = url.removeprefix("http://").rpartition(":")
    rng = random.Random(f"{time.time()} {seed}")
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(answers):
        asked = {
            "model": model, "stream": True, "max_tokens": arguments.new_tokens,
            "prompt": [rng.randrange(300, 6000) for _ in range(arguments.prompt_tokens)],
        }  # fmt: skip
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        before, first = time.perf_counter(), True
        async for tokens in chunks(reader):
            now = time.perf_counter()
            (found.first if first else found.gaps).append(now - before)
            before, first = now, False
            found.tokens += tokens
    writer.close()


async def chunks(reader: asyncio.StreamReader):
    """Of one answer: how many tokens came at a time."""
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"error: the server answered {status.decode()}")
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: ") and b'"finish_reason":null' in line:
            yield 1
    await reader.readuntil(b"0\r\n\r\n")


if __name__ == "__main__":
    main()
