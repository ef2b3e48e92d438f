"""Two thousand requests of all kinds, and what the server holds before and after."""

import asyncio
import json
import random
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.memorised import make_memorised
from tests.serving.served import make_talker, serving

GROWTH = 32 << 20  # bytes; 2,000 answers that are never forgotten would be more


def request(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body: most are good."""
    text = " ".join(rng.choices(("Who", "Add", "2", "Rome", "是谁", "🌱"), k=rng.randint(1, 10)))
    kind, tokens = rng.random(), rng.randint(1, 60)
    if kind < 0.1:
        return "v1/chat/completions", b"[" * rng.randint(1, 50_000)
    if kind < 0.15:
        return "v1/completions", json.dumps({"model": "talker", "prompt": text * 400}).encode()
    asked: dict[str, Any] = {"max_tokens": tokens, "stream": rng.random() < 0.5, "seed": rng.randrange(99)}
    if kind < 0.6:
        asked |= {"model": "memorised", "messages": [{"role": "user", "content": text}], "logprobs": kind < 0.3}
        return "v1/chat/completions", json.dumps(asked).encode()
    return "v1/completions", json.dumps(asked | {"model": "talker", "prompt": text, "n": rng.randint(1, 3)}).encode()


async def load(url: str, number: int, rng: random.Random) -> list[int]:
    """The status of each; 0 of those that left in the middle."""
    room = asyncio.Semaphore(32)

    async def one(client: httpx.AsyncClient) -> int:
        path, body = request(rng)
        async with room:
            if rng.random() < 0.1:
                with suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(client.post(url + path, content=body), rng.random() * 0.2)
                return 0
            return (await client.post(url + path, content=body)).status_code

    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(timeout=600, headers=headers, limits=httpx.Limits(max_connections=64)) as client:
        return await asyncio.gather(*(one(client) for _ in range(number)))


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(tmp_path, capsys):
    folders = make_memorised(tmp_path / "memorised"), make_talker(tmp_path / "talker", max_seq_len=256)
    rng = random.Random(0)
    with serving("--model", *folders, "--threads", 1) as server:
        asyncio.run(load(server.url, 1000, rng))  # what is made at the first use
        assert server.idle()
        before = server.memory()
        statuses = asyncio.run(load(server.url, 2000, rng))
        assert server.idle()
        after = server.memory()
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    with capsys.disabled():
        print(f"\n{counts}; {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after")
    assert set(counts) == {0, 200, 400} and counts[200] > 1000
    assert after - before < GROWTH
