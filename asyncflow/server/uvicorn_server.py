"""The web server: uvicorn on a socket that is bound before, in this event loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from protocols.control.errors import BadInput

HEADER_SECONDS = 20.0  # in which a request's head has to arrive
CLOSE_SECONDS = 3  # for answers that are on their way when the server ends
MOST_CONNECTIONS = 4096
IDLE_SECONDS = 75  # a connection stays open; longer than clients keep theirs, else one sends while the server closes


class PatientProtocol(H11Protocol):
    """Closes connections on which no request's head arrives in time, which uvicorn itself keeps."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if not waits and self._late is not None:
            self._late.cancel()
            self._late = None
        elif waits and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        self._late = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Bind an address. Raises BadInput where it is taken or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--host {host} --port {port}: can't be used: {error}; choose another port") from error


def server_of(application: Any) -> uvicorn.Server:
    """A server that is not started."""
    return uvicorn.Server(
        uvicorn.Config(
            application,
            http=PatientProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )


@contextmanager
def in_thread(application: Callable[[], Any], bound: socket.socket, name: str) -> Iterator[Callable[[], None]]:
    """Serve in a thread with its own event loop, which makes the application; yields what ends it."""
    servers: list[uvicorn.Server] = []
    started = threading.Event()

    async def serve() -> None:
        try:
            servers.append(server_of(application()))
        finally:
            started.set()
        await servers[0].serve(sockets=[bound])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name=name, daemon=True)
    thread.start()
    started.wait()

    def stop() -> None:
        for server in servers:
            server.should_exit = True
        thread.join(CLOSE_SECONDS + 2)

    try:
        yield stop
    finally:
        for server in servers:
            server.should_exit = True
        bound.close()
