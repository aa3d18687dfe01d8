"""CollectiveCalls serialises the collective calls of a service's ranks.

Two calls at once could be entered in different orders on different ranks and deadlock. If one rank fails, the others
get GRACE_SECONDS to fail too; then the group is marked broken and refuses work. So it is after a call that was
cancelled half way, since some ranks may have entered it and others not. Ranks that work independently are not affected.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asyncflow.services.channels.endpoint import ServiceError, causes

T = TypeVar("T")

GRACE_SECONDS = 5.0  # two ranks report the same fault within less


class CollectiveCalls:
    """The calls of all ranks of a service; `collective`: the ranks work together."""

    def __init__(self, service: str, collective: bool, grace_seconds: float = GRACE_SECONDS) -> None:
        self._service, self._collective, self._grace = service, collective, grace_seconds
        self._lock = asyncio.Lock()
        self._fault = ""

    @property
    def in_step(self) -> bool:
        """Whether the ranks can still enter a collective together."""
        return not self._fault

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """No other call starts inside of this. Not reentrant."""
        if not self._collective:
            yield
            return
        async with self._lock:
            yield

    async def run(self, what: str, parts: Mapping[int, Coroutine[Any, Any, T]]) -> dict[int, T]:
        """Run every rank's part of a call; results by rank. Raises ServiceError with the first failed rank's cause."""
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
                self._fault = f"{what} was cancelled half way"
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
            raise ServiceError(f"{self._fault}; ranks {', '.join(stuck)} wait for it") from error
        raise error
