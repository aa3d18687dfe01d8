"""TermScope runs what others ask of a service for as long as the service's term lasts.

Rows and requests of a term that is over would wait for ever: the stages that they wait for have ended with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from asyncflow.services.channels.endpoint import ServiceGone

T = TypeVar("T")


class TermOver(Exception):
    """What was asked for belongs to a term that is over."""


class TermScope:
    """The current term of a service, from `start` until `end`."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._over: asyncio.Future[None] | None = None  # done when another term has begun
        self._gone: asyncio.Future[None] | None = None  # done when the service has ended

    def start(self) -> None:
        """The first term begins."""
        self._over = asyncio.get_running_loop().create_future()
        self._gone = asyncio.get_running_loop().create_future()

    def begin_next(self) -> None:
        """End what runs in the current term, and begin the next."""
        if self._over is not None:
            self._over.set_result(None)
        self._over = asyncio.get_running_loop().create_future()

    def end(self) -> bool:
        """End what runs: the service ends. Returns whether it was running."""
        if self._gone is None or self._gone.done():
            return False
        self._gone.set_result(None)
        return True

    async def run(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Do something until the term is over. Raises TermOver then, ServiceGone where the service ends."""
        over, gone = self._over, self._gone
        assert over is not None and gone is not None, f"service {self._service} is not started"
        task = asyncio.create_task(work, name=f"{what} on {self._service}")
        try:
            await asyncio.wait((task, over, gone), return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ServiceGone(f"{self._service}: {what}: it has ended")
            if over.done():
                raise TermOver(f"{what}: a new term has begun")
            return task.result()
        finally:
            task.cancel()
