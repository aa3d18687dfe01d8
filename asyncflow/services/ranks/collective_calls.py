"""Work that all ranks of a service do together, in collectives: one thing after the other, done by all or given up.

Two things side by side would meet in the wrong order on two ranks. And one rank that raises, or dies, leaves the others
waiting for it inside a collective: they are given a moment, in case they are about to say the same or a death is
what is behind it, and then nothing more is asked of ranks that are no longer in step. Nor is it where a caller gave up
half way: one rank may have begun what another was not told of. Ranks that work apart only ever wait for themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asyncflow.services.channels.endpoint import ServiceError, causes

T = TypeVar("T")

GRACE_SECONDS = 5.0  # what two ranks say of the same fault differs by less


class CollectiveCalls:
    """The ranks of a service that work together, or of one that need not."""

    def __init__(self, service: str, collective: bool, grace_seconds: float = GRACE_SECONDS) -> None:
        self._service, self._collective, self._grace = service, collective, grace_seconds
        self._turn = asyncio.Lock()
        self._fault = ""

    @property
    def in_step(self) -> bool:
        """Whether the ranks can still do something together."""
        return not self._fault

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Nothing else is begun with the ranks inside of this. Not reentrant."""
        if not self._collective:
            yield
            return
        async with self._turn:
            yield

    async def all(self, what: str, parts: Mapping[int, Coroutine[Any, Any, T]]) -> dict[int, T]:
        """Every rank's part of one thing, by rank. Raises ServiceError with the cause of the first rank that failed."""
        if self._fault:
            for part in parts.values():
                part.close()
            raise ServiceError(f"{self._service}: {what}: its ranks are out of step: {self._fault}")
        tasks = {rank: asyncio.create_task(part, name=f"{what} on rank {rank}") for rank, part in parts.items()}
        first = asyncio.FIRST_EXCEPTION if self._collective else asyncio.ALL_COMPLETED
        try:
            await asyncio.wait(tasks.values(), return_when=first)
            if failed := [rank for rank, task in tasks.items() if task.done() and task.exception()]:
                await self._fail(what, tasks, failed[0])
        except asyncio.CancelledError:
            if self._collective:
                self._fault = f"{what} was given up half way"
            raise
        finally:
            for task in tasks.values():
                task.cancel()
        return {rank: task.result() for rank, task in tasks.items()}

    async def _fail(self, what: str, tasks: Mapping[int, asyncio.Task[Any]], first: int) -> None:
        if running := [task for task in tasks.values() if not task.done()]:
            await asyncio.wait(running, timeout=self._grace)
        errors = {rank: task.exception() for rank, task in tasks.items() if task.done()}
        stuck = [str(rank) for rank, task in tasks.items() if not task.done()]
        error = errors[first]
        assert error is not None
        if stuck:
            self._fault = causes(error)
            raise ServiceError(f"{self._fault}; ranks {', '.join(stuck)} wait for it in vain") from error
        raise error
