"""What every request passes before anything looks at it: the key, the size of its body, the time it may take.

It answers by itself where one of them is wrong, in OpenAI's form, and counts all answers. A body is read here as a
whole, so that no more of it than is allowed is ever in memory.
"""

import asyncio
import contextlib
import hmac
import ipaddress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError
from serving.metrics import Metrics

DRAINED = 1 << 24  # bytes too many that are read, and not kept: who is cut off while sending never reads why
OPEN = ("/", "/health")  # to everyone, as are the files of the page: they hold nothing secret


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    body_bytes: int = 1 << 20
    seconds: float = 600.0  # from its arrival on, waiting included


class Guard:
    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self.app, self.api_key, self.limits, self.metrics = app, api_key, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self.limits.seconds + 5):  # the engine's own limit comes first, and says more
                self.check_key(scope)
                await self.app(scope, replayed(await self.body(scope, receive), receive), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except TimeoutError:
            if status == 0:
                late = ApiError(408, "the request took longer than the server allows", code="timeout")
                await late.response()(scope, receive, counted)
            # what was begun is left without its end: the connection is closed, and does not look as if all had come
        finally:
            self.metrics.requests.labels(known(scope), str(status or 499)).inc()

    def check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self.api_key is None:
            check_host(Headers(scope=scope).get("host", ""))
        if self.api_key is None or path in OPEN or path.startswith("/page/"):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            found = "another key" if key else "no key"
            raise ApiError(
                401,
                f"found {found}, expected this server's: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.limits.body_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > most + DRAINED:
            raise self.too_large(f"{declared} bytes")
        parts, size, more = [], 0, True
        while more and size <= most + DRAINED:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            part = message.get("body", b"")
            size, more = size + len(part), message.get("more_body", False)
            if size <= most:
                parts.append(part)
        if size > most:
            raise self.too_large(f"more than {most} bytes" if declared == "0" else f"{declared} bytes")
        return b"".join(parts)

    def too_large(self, found: str) -> ApiError:
        return ApiError(413, f"the body has {found}, and may have {self.limits.body_bytes}", code="request_too_large")


def check_host(host: str) -> None:
    """Without a key a server is there for its own machine. A name made to lead to it would let any page that a browser
    has open speak to it (DNS rebinding); such a name is what stands in the header."""
    local = False
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        local = name == "localhost" or ipaddress.ip_address(name).is_loopback
    if not local:
        raise ApiError(
            403, f"found the host {host[:80]!r}, expected localhost; to be reached by a name, give --api_key"
        )


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and then what else there is to receive."""
    first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


def known(scope: Scope) -> str:
    """The path of the route that was taken: a label of which there are few, whatever is asked for."""
    route = scope.get("route")
    return getattr(route, "path", "other")
