"""StartingRun: what `launch` and `resume` return. Nothing has started before it is entered or awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

from asyncflow.client.run import Run


class StartingRun:
    """A run that is about to start, for one of two ways to hold it.

    async with launch(recipe) as run: ...    leaving the block stops the run and frees its processes
    run = await launch(recipe)               for the cells of a notebook: it goes on until its last step or `run.stop()`

    A run that was awaited frees its processes when it ends, also if nobody waits for that. It belongs to the event loop
    that started it: asyncio.run ends it at once when the main function returns, as Ctrl-C would.
    """

    def __init__(self, context: AbstractAsyncContextManager[Run]) -> None:
        """`context` starts the run and ends it."""
        self._context = context

    def __repr__(self) -> str:
        return "a run that has not started: use `run = await ...` or `async with ... as run:`"

    async def __aenter__(self) -> Run:
        return await self._context.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._context.__aexit__(kind, error, traceback)

    def __await__(self) -> Generator[Any, None, Run]:
        return self._start().__await__()

    async def _start(self) -> Run:
        started: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        holding = asyncio.create_task(self._hold(started), name="asyncflow run")
        _held.add(holding)
        holding.add_done_callback(_held.discard)
        try:
            await asyncio.wait((started, holding), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            raise
        if not started.done():
            await holding  # raises what has gone wrong
        run = started.result()
        run.released_by(holding)
        return run

    async def _hold(self, started: asyncio.Future[Run]) -> None:
        async with self._context as run:
            started.set_result(run)
            await run.outcome()


_held: set[asyncio.Task[None]] = set()  # an event loop itself holds its tasks by weak references only
