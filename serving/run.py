"""The app and an address in, a listening server out, until a signal stops it."""

import signal
import socket

import uvicorn
from fastapi import FastAPI

BACKLOG = 128  # connections that the system keeps until they are taken
MAX_CONNECTIONS = 512  # further ones are told 503; a process may have about 1,000 files open


def listen(app: FastAPI, host: str, port: int, stop_seconds: float) -> None:
    """Answer until SIGTERM or SIGINT. Nothing new is taken then, and what runs has so many seconds to end.

    Raises OSError for an address that cannot be listened at. Where port is 0 any is taken; which, is printed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen at {host} port {port}: {error.strerror}; give another --port") from None
        listener.listen(BACKLOG)  # who connects from here on is heard
        shown = f"[{host}]" if ":" in host else host
        print(f"listening at http://{shown}:{listener.getsockname()[1]}/", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(stop_seconds)),
            server_header=False, limit_concurrency=MAX_CONNECTIONS,
        )  # fmt: skip
        server = uvicorn.Server(config)

        def stop(*_: object) -> None:
            server.should_exit = True

        # before uvicorn has handlers of its own, and when it has stopped and sends itself the signal again
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, stop)
        server.run(sockets=[listener])
