"""What clients want of a run: to pause it, to stop it, a checkpoint, a reload of code. It outlasts the run's terms."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from asyncflow.control.events import Notifier
from asyncflow.control.supervision.outcome import RunFailed
from protocols.control.events import CodeReloaded

A = TypeVar("A")


class ClientRequests:
    """The state that clients ask for, and those that wait for an answer. Whoever changes it notifies `changed`."""

    def __init__(self) -> None:
        self.changed = Notifier()
        self.paused = False
        self.stopping = False
        self.abandons_step = asyncio.Event()  # a stop does not wait for the step that is training
        self.over = False
        self._checkpoints: list[asyncio.Future[str]] = []
        self._reloads: list[asyncio.Future[CodeReloaded]] = []

    @property
    def pending(self) -> bool:
        """Whether a client waits for an answer."""
        return bool(self._checkpoints or self._reloads)

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a client waits for a checkpoint."""
        return bool(self._checkpoints)

    @property
    def reloads(self) -> int:
        """The number of clients that wait for a reload."""
        return len(self._reloads)

    async def checkpoint(self, if_over: str) -> str:
        """The folder of the next checkpoint. Raises RunFailed with `if_over`, or if the run ends first."""
        return await self._wait(self._checkpoints, if_over)

    async def reload(self) -> CodeReloaded:
        """The next reload. Raises BadCode if it is refused, RunFailed if the run is over or ends first."""
        return await self._wait(self._reloads, "the run is over: nothing runs that could be reloaded")

    async def _wait(self, waiting: list[asyncio.Future[A]], if_over: str) -> A:
        if self.over:
            raise RunFailed(if_over)
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        waiting.append(answer)
        self.changed.notify()
        return await answer

    def answer_checkpoints(self, folder: str) -> None:
        """A checkpoint is written: answer all that wait for one."""
        for future in _take(self._checkpoints, len(self._checkpoints)):
            future.set_result(folder)

    def answer_reloads(self, count: int, answer: CodeReloaded | Exception) -> None:
        """Answer the first `count` clients that wait for a reload: those that came before it began."""
        for future in _take(self._reloads, count):
            if isinstance(answer, Exception):
                future.set_exception(type(answer)(str(answer)))  # one each: a raised exception grows a traceback
            else:
                future.set_result(answer)

    def end(self, why: str) -> None:
        """The run is over: everyone who waits gets RunFailed."""
        self.over = True
        for future in [*_open(self._checkpoints), *_open(self._reloads)]:
            future.set_exception(RunFailed(f"the run ended before it: {why}"))


def _take(waiting: list[asyncio.Future[A]], count: int) -> list[asyncio.Future[A]]:
    taken = waiting[:count]
    del waiting[:count]
    return _open(taken)


def _open(waiting: Iterable[asyncio.Future[A]]) -> list[asyncio.Future[A]]:
    """The futures whose clients still wait."""
    return [future for future in waiting if not future.done()]
