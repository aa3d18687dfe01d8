"""The client for programs without an event loop: the same calls, which wait. One loop in a thread runs them all.

with blocking.connect("http://127.0.0.1:8642") as client:
    run = client.submit("recipe.toml")
    for event in run.events():
        ...
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from asyncflow.client.connect import Client, RemoteRun
from asyncflow.client.connect import connect as connect_async
from protocols.control.events import CodeReloaded, Event, RunEnded
from protocols.control.runs import Artifact, Capabilities, RunStatus, Sample

if TYPE_CHECKING:
    from protocols.control.delivery import ServiceStatistics

T = TypeVar("T")


def connect(url: str, token: str | None = None, *, patience: float = 120.0, timeout: float | None = None) -> SyncClient:
    """Connect to a server, as `asyncflow.connect` does.

    `timeout`: seconds after which a call raises TimeoutError; None waits. What the call has asked for goes on.
    """
    return SyncClient(connect_async(url, token, patience=patience), _Loop(timeout))


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="asyncflow client", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine; its result. An interrupt of the caller, and the timeout, cancel it."""
        return self._wait(work, self._timeout)

    def _wait(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def each(self, items: AsyncGenerator[T]) -> Iterator[T]:
        """The items one by one. Waiting for the next has no timeout."""

        one = asyncio.Lock()  # a generator can't be closed before the step that an interrupt cancels has ended

        async def following() -> tuple[T] | None:
            async with one:
                async for item in items:
                    return (item,)
            return None

        async def close() -> None:
            async with one:
                await items.aclose()

        try:
            while (found := self._wait(following(), None)) is not None:
                yield found[0]
        finally:
            self.do(close())


class SyncClient:
    """`Client` for programs without an event loop."""

    def __init__(self, client: Client, loop: _Loop) -> None:
        self._client, self._loop = client, loop

    def __enter__(self) -> SyncClient:
        self._loop.start()
        self._loop.do(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._loop.do(self._client.__aexit__(kind, error, traceback))
        finally:
            self._loop.stop()

    def capabilities(self) -> Capabilities:
        return self._loop.do(self._client.capabilities())

    def submit(
        self,
        recipe: str | Path | Mapping[str, Any],
        overrides: Iterable[str] = (),
        *,
        run: str = "",
        key: str | None = None,
    ) -> SyncRun:
        return SyncRun(self._loop.do(self._client.submit(recipe, overrides, run=run, key=key)), self._loop)

    def resume(
        self, run: str, overrides: Iterable[str] = (), *, allow_fresh: bool = False, key: str | None = None
    ) -> SyncRun:
        resumed = self._client.resume(run, overrides, allow_fresh=allow_fresh, key=key)
        return SyncRun(self._loop.do(resumed), self._loop)

    def runs(self) -> list[RunStatus]:
        return self._loop.do(self._client.runs())

    def run(self, name: str) -> SyncRun:
        return SyncRun(self._loop.do(self._client.run(name)), self._loop)


class SyncRun:
    """`RemoteRun` for programs without an event loop: `run` is the one that it calls."""

    def __init__(self, run: RemoteRun, loop: _Loop) -> None:
        self.run, self._loop = run, loop
        self.name, self.folder = run.name, run.folder

    @property
    def cursor(self) -> int:
        return self.run.cursor

    def events(self, cursor: int | None = None) -> Iterator[Event]:
        for _, event in self.follow(cursor):
            yield event

    def follow(self, cursor: int | None = None) -> Iterator[tuple[int, Event]]:
        return self._loop.each(self.run.follow(cursor))

    def wait(self) -> RunEnded:
        return self._loop.do(self.run.wait())

    def pause(self) -> None:
        self._loop.do(self.run.pause())

    def resume(self) -> None:
        self._loop.do(self.run.resume())

    def checkpoint(self) -> Path:
        return self._loop.do(self.run.checkpoint())

    def reload(self) -> CodeReloaded:
        return self._loop.do(self.run.reload())

    def statistics(self) -> list[ServiceStatistics]:
        return self._loop.do(self.run.statistics())

    def stop(self, *, abandon: bool = False) -> RunEnded:
        return self._loop.do(self.run.stop(abandon=abandon))

    def drain(self) -> RunEnded:
        return self._loop.do(self.run.drain())

    def cancel(self) -> RunEnded:
        return self._loop.do(self.run.cancel())

    def status(self, *, unlike: str = "", seconds: float = 0.0) -> RunStatus:
        return self._loop.do(self.run.status(unlike=unlike, seconds=seconds))

    def recipe(self) -> dict[str, Any]:
        return self._loop.do(self.run.recipe())

    def artifacts(self) -> list[Artifact]:
        return self._loop.do(self.run.artifacts())

    def artifact(self, path: str, to: str | Path) -> Path:
        return self._loop.do(self.run.artifact(path, to))

    def log(self, service: str = "controller", *, last_bytes: int = 1 << 16) -> str:
        return self._loop.do(self.run.log(service, last_bytes=last_bytes))

    def samples(self, state: str = "", *, after: int = -1, limit: int = 1000) -> list[Sample]:
        return self._loop.do(self.run.samples(state, after=after, limit=limit))

    def sample(self, sample_id: int) -> Sample:
        return self._loop.do(self.run.sample(sample_id))
