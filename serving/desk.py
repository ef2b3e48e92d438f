"""Between the event loop and the engine's thread: jobs are handed in, what comes of them is handed out.

ticket = desk.submit("full_sft_512", jobs)                raises ApiError where there is no room
async with ticket.watched(request.receive):               a client that goes away gives its slots back
    async for came in ticket:                             until all are over
        for number, progress in came: ...                 of job `number` of them
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from serving.engine import Delivery, Engine, Job, Progress

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Ticket:
    """The jobs of one request."""

    def __init__(self, desk: "Desk", jobs: Sequence[Job]) -> None:
        self.desk, self.jobs = desk, jobs
        self.inbox: asyncio.Queue[tuple[int, Progress] | None] = asyncio.Queue()  # None: the client is gone
        self.open = len(jobs)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Progress]]]:
        """All that came since the last time. Raises ApiError for a job that failed, ClientGone where nobody reads."""
        while self.open:
            found = [await self.inbox.get()]
            while not self.inbox.empty():
                found.append(self.inbox.get_nowait())
            if None in found:
                raise ClientGone
            came = [each for each in found if each is not None]
            for _, progress in came:
                if progress.error:
                    raise progress.error
            self.open -= sum(progress.finish_reason is not None for _, progress in came)
            yield came

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        watch = asyncio.create_task(self.watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.desk.close(self)

    async def watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.inbox.put_nowait(None)


class Desk:
    """One for a server. Made and used in the event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tickets: dict[Job, tuple[Ticket, int]] = {}

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def deliver(delivery: Delivery) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to read
                loop.call_soon_threadsafe(self.post, delivery)

        self.engine.start(deliver)

    def post(self, delivery: Delivery) -> None:
        for job, progress in delivery:
            if found := self.tickets.get(job):
                ticket, number = found
                ticket.inbox.put_nowait((number, progress))

    def submit(self, name: str, jobs: Sequence[Job]) -> Ticket:
        """Raises ApiError where there is no room for them."""
        ticket = Ticket(self, jobs)
        self.engine.submit(name, jobs)
        self.tickets |= {job: (ticket, number) for number, job in enumerate(jobs)}
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Whatever is not over is not wanted any more."""
        for job in ticket.jobs:
            del self.tickets[job]
            self.engine.cancel(job)
