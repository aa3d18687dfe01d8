"""The endpoint of one run, in its own process: `asyncflow run --serve`.

It runs in a thread with its own event loop, so that a loop which computes holds up no client, and no client the run.
Commands go over to the run's loop; whatever only reads is read from the run's folder.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import msgspec

from asyncflow.client.http import TOKEN
from asyncflow.client.run import Run
from asyncflow.control.store.run_log import read_end
from asyncflow.run.run_status import status_of
from asyncflow.server.access import LOOPBACK, Tokens, hosts_of, tokens_of
from asyncflow.server.app import application, guarded
from asyncflow.server.endpoint_file import ENDPOINT, write_endpoint
from asyncflow.server.operations import Operations
from asyncflow.server.records import Records, digest_of
from asyncflow.server.uvicorn_server import in_thread, listen
from protocols.control.events import RunEnded
from protocols.control.problems import NotAllowed, NotFound
from protocols.control.runs import Answer, Capabilities, Command, Endpoint, Restart, RunStatus, Scope, Submission

if TYPE_CHECKING:
    from protocols.control.delivery import ServiceStatistics

T = TypeVar("T")


class OwnRun:
    """Implements `Runs` for the run of this process."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        """`loop`: the run's, which is another one than that of the calls."""
        self._run, self._loop = run, loop
        self._operations = Operations(Records(None))

    def capabilities(self, scope: Scope) -> Capabilities:
        return Capabilities(version=version("asyncflow"), scope=scope, commands=list(get_args(Command)), submits=False)

    async def list(self) -> list[RunStatus]:
        return [await self.status(self._run.name)]

    async def status(self, name: str) -> RunStatus:
        status = await asyncio.to_thread(status_of, await self.folder(name))
        ended = await self.ended(name)  # the process still holds the lock
        return status if ended is None else msgspec.structs.replace(status, state=ended.outcome, error=ended.error)

    async def ended(self, name: str) -> RunEnded | None:
        return await asyncio.to_thread(read_end, await self.folder(name))

    async def folder(self, name: str) -> Path:
        if name != self._run.name:
            raise NotFound(f"this process runs {self._run.name!r} only, not {name!r}")
        return self._run.folder

    async def submit(self, submission: Submission, key: str) -> RunStatus:
        raise NotAllowed("this process runs one run: submit to `asyncflow serve`")

    async def start(self, name: str, restart: Restart, key: str) -> RunStatus:
        raise NotAllowed("this process ends with its run: start it again by `asyncflow serve`, or `asyncflow resume`")

    async def command(self, name: str, command: Command, key: str, seconds: float) -> Answer | None:
        await self.folder(name)
        request = digest_of(name, command)
        return await self._operations.run(key, request, 0, lambda: self._carry_out(command), seconds)

    async def statistics(self, name: str) -> list[ServiceStatistics]:
        await self.folder(name)
        return await self._over_there(self._run.statistics)

    async def _carry_out(self, command: Command) -> Answer:
        calls: dict[Command, Callable[[], Awaitable[Any]]] = {
            "pause": self._run.pause,
            "resume": self._run.resume,
            "checkpoint": self._run.checkpoint,
            "reload": self._run.reload,
            "drain": self._run.stop,
            "cancel": lambda: self._run.stop(abandon=True),
        }
        result = await self._over_there(calls[command])
        return Answer(command, str(result) if isinstance(result, Path) else msgspec.to_builtins(result))

    async def _over_there(self, call: Callable[[], Awaitable[T]]) -> T:
        async def called() -> T:
            return await call()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(called(), self._loop))


@asynccontextmanager
async def served(context: AbstractAsyncContextManager[Run], port: int = 0) -> AsyncIterator[Run]:
    """Start a run, and answer its clients on a port of this machine until it ends; 0: a port that is free."""
    async with context as run:
        with listen("127.0.0.1", port) as bound:
            token = secrets.token_urlsafe(32)
            own, also = tokens_of(token, None), tokens_of(os.environ.get(TOKEN, ""), None)
            tokens, hosts = Tokens({**also.scopes, **own.scopes}), hosts_of("127.0.0.1", LOOPBACK)
            loop = asyncio.get_running_loop()

            def made() -> Any:
                return guarded(application(OwnRun(run, loop), version("asyncflow")), tokens, hosts)

            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            with in_thread(made, bound, f"endpoint of {run.name}") as stop:
                try:
                    await asyncio.to_thread(write_endpoint, run.folder, Endpoint(url, token, os.getpid()))
                    print(f"answers at {url}; its token is in {run.folder / ENDPOINT}", file=sys.stderr)  # noqa: T201
                    yield run
                finally:
                    await asyncio.to_thread(stop)
                    await asyncio.to_thread((run.folder / ENDPOINT).unlink, missing_ok=True)
