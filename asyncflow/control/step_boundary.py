"""What a client asks for and gets between two steps: checkpoints, and newer files of the user's own code.

No batch is closed and nothing trains meanwhile; what is under way goes on. Who asked is answered, or told that the
run ended first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.user_code import UserCode
from protocols.control.events import CodeRefused, CodeReloaded, Event
from workers.user_code import BadCode, digest_of

A = TypeVar("A")


class StepBoundary:
    """One run's boundary between its steps."""

    def __init__(
        self,
        record: RunStore,
        fleet: ServiceSupervisor,
        code: UserCode,
        deadline_seconds: float,  # of a checkpoint
        emit: Callable[[Event], None],
        wake: Callable[[], None],  # the steps, which may be waiting for a batch
    ) -> None:
        self._record, self._fleet, self._code = record, fleet, code
        self._deadline, self._emit, self._wake = deadline_seconds, emit, wake
        self._checkpoint_asked: list[asyncio.Future[str]] = []
        self._reload_asked: list[asyncio.Future[CodeReloaded]] = []
        self._over = False

    @property
    def asked(self) -> bool:
        """Whether somebody waits."""
        return bool(self._checkpoint_asked or self._reload_asked)

    async def checkpoint(self) -> str:
        """The folder of a checkpoint at the next boundary. RunFailed where the run ends first."""
        return await self._ask(
            self._checkpoint_asked, f"the run is over; its last checkpoint: {self._record.last_checkpoint or 'none'}"
        )

    async def reload(self) -> CodeReloaded:
        """Every service runs the changed files from the next boundary on. BadCode, RunFailed as `Controller.reload`."""
        return await self._ask(self._reload_asked, "the run is over: nothing runs that could be reloaded")

    async def _ask(self, waiting: list[asyncio.Future[A]], over: str) -> A:
        if self._over:
            raise RunFailed(over)
        asked: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        waiting.append(asked)
        self._wake()
        return await asked

    def end(self, why: str) -> None:
        """The run is over: nobody who still waits is answered."""
        self._over = True
        for future in [*_open(self._checkpoint_asked), *_open(self._reload_asked)]:
            future.set_exception(RunFailed(f"the run ended before it: {why}"))

    async def do(self, *, checkpoint: bool = False) -> None:
        """Do what is waited for, and a checkpoint where the run wants one itself. RunFailed past its deadline."""
        if checkpoint or self._checkpoint_asked:
            await self.write_checkpoint()
        if self._reload_asked:
            await self._reload()

    async def write_checkpoint(self) -> None:
        """Write the checkpoint of the last step, unless it is there, and tell who waits for one."""
        step = self._record.version
        try:
            async with asyncio.timeout(self._deadline):
                written = await self._record.write_checkpoint(self._fleet.services, step)
        except TimeoutError:
            raise RunFailed(f"checkpoint of step {step} not written within {self._deadline:g} s") from None
        if written is not None:
            self._emit(written)
        asked, self._checkpoint_asked = self._checkpoint_asked, []
        for future in _open(asked):
            future.set_result(self._record.last_checkpoint)

    async def _reload(self) -> None:
        asked = list(self._reload_asked)
        try:
            answer = await self._take_code()
        except BadCode as error:
            answer = error
        del self._reload_asked[: len(asked)]  # not before: who asks is told if the run ends by it
        for future in _open(asked):
            if isinstance(answer, BadCode):
                future.set_exception(BadCode(str(answer)))
            else:
                future.set_result(answer)

    async def _take_code(self) -> CodeReloaded:
        """Raises BadCode, with nothing changed, where a file can't be used."""
        step = self._record.version
        digests: dict[str, str] = {}
        try:
            sources = await asyncio.to_thread(self._code.changed)
            digests = {source.module: digest_of(source) for source in sources}
            if sources:
                await self._code.give(sources, self._fleet.services)
        except BadCode as error:
            self._emit(CodeRefused(step=step, digests=digests, error=str(error)))
            raise
        reloaded = CodeReloaded(step=step, digests=digests)
        self._emit(reloaded)
        return reloaded


def _open(asked: Iterable[asyncio.Future[A]]) -> list[asyncio.Future[A]]:
    """Those whose askers still wait."""
    return [future for future in asked if not future.done()]
