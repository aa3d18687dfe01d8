"""What `launch` returns: entered, its block ends the run; awaited, the run ends by itself or by `stop`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncflow.client.run import Run
from asyncflow.client.starting_run import StartingRun
from protocols.control.events import Event, RunEnded

ENDED = RunEnded(outcome="stopped", step=1, error="", exit_code=130)


class Link:
    """A fake link to a run that ends when it is stopped."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()

    async def follow(self, cursor: int) -> AsyncIterator[tuple[int, Event]]:
        await self.stopped.wait()
        yield 1, ENDED

    async def stop(self, *, abandon: bool) -> RunEnded:
        self.stopped.set()
        return ENDED


class Context:
    """A fake start of a run: what happened, in order."""

    def __init__(self, starts: asyncio.Event | None = None, error: Exception | None = None) -> None:
        self.seen: list[str] = []
        self._starts, self._error = starts, error

    @property
    def run(self) -> AbstractAsyncContextManager[Run]:
        return self._run()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[Run]:
        self.seen.append("starts")
        try:
            if self._starts is not None:
                await self._starts.wait()
            if self._error is not None:
                raise self._error
            link: Any = Link()
            yield Run(link, "r", Path("r"))
        finally:
            await asyncio.sleep(0)
            self.seen.append("is freed")


async def test_nothing_starts_before_it_is_entered_or_awaited():
    context = Context()
    assert "use `run = await ...`" in repr(StartingRun(context.run))
    assert not context.seen


async def test_leaving_the_block_ends_the_run():
    context = Context()
    async with StartingRun(context.run) as run:
        assert (await run.stop()) == ENDED
        assert context.seen == ["starts"], "`stop` does not wait for what the block does"
    assert context.seen == ["starts", "is freed"]


@pytest.mark.parametrize("how", ["stop", "wait"])
async def test_an_awaited_run_is_freed_when_its_end_is_waited_for(how: str):
    context = Context()
    run = await StartingRun(context.run)
    assert context.seen == ["starts"]
    if how == "wait":
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(run.stop()))
    assert await getattr(run, how)() == ENDED
    assert context.seen == ["starts", "is freed"]
    assert await run.wait() == ENDED


async def test_an_error_of_the_start_is_raised():
    context = Context(error=ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        await StartingRun(context.run)
    assert context.seen == ["starts", "is freed"]


async def test_a_cancelled_start_is_undone_before_the_cancellation_is_raised():
    context = Context(starts=asyncio.Event())
    task = asyncio.ensure_future(StartingRun(context.run))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert context.seen == ["starts", "is freed"]


def test_the_end_of_the_loop_ends_an_awaited_run():
    context = Context()

    async def main() -> None:
        await StartingRun(context.run)

    asyncio.run(main())
    assert context.seen == ["starts", "is freed"]
