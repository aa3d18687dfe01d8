"""What clients ask for between two steps: checkpoints, and reloads of the user's own code.

No batch is closed and nothing trains meanwhile; generation goes on. Every client gets an answer, or RunFailed if the
run ends first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from asyncflow.control.events import Notifier
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.user_code import UserCode
from asyncflow.services.channels.endpoint import ServiceError, all_or_error, ask, causes
from protocols.control.events import CodeRefused, CodeReloaded
from protocols.control.requests import AbandonStep
from workers.user_code import BadCode, digest_of

ABANDON_SECONDS = 30.0  # a service gives up a step at once, beside its computing, or does not answer at all

A = TypeVar("A")


class StepBoundary:
    """One run's boundary between its steps. `changed` is notified of new requests: the steps may wait for a batch."""

    def __init__(
        self,
        run_store: RunStore,
        supervisor: ServiceSupervisor,
        code: UserCode,
        checkpoint_deadline_seconds: float,
        changed: Notifier,
    ) -> None:
        self._run_store, self._supervisor, self._code = run_store, supervisor, code
        self._deadline, self._changed = checkpoint_deadline_seconds, changed
        self._checkpoints: list[asyncio.Future[str]] = []  # clients that wait for one
        self._reloads: list[asyncio.Future[CodeReloaded]] = []
        self._started_at = run_store.version
        self._over = False
        self.writing = False  # a checkpoint

    @property
    def pending(self) -> bool:
        """Whether a client waits for an answer."""
        return bool(self._checkpoints or self._reloads)

    async def checkpoint(self) -> str:
        """The folder of a checkpoint written at the next boundary. RunFailed if the run ends first."""
        return await self._wait(
            self._checkpoints, f"the run is over; its last checkpoint: {self._run_store.last_checkpoint or 'none'}"
        )

    async def reload(self) -> CodeReloaded:
        """Every service runs the changed files from the next boundary on. BadCode, RunFailed as `Controller.reload`."""
        return await self._wait(self._reloads, "the run is over: nothing runs that could be reloaded")

    async def _wait(self, waiting: list[asyncio.Future[A]], over: str) -> A:
        if self._over:
            raise RunFailed(over)
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        waiting.append(answer)
        self._changed.notify()
        return await answer

    def end(self, why: str) -> None:
        """The run is over: every waiting client gets RunFailed."""
        self._over = True
        for future in [*_open(self._checkpoints), *_open(self._reloads)]:
            future.set_exception(RunFailed(f"the run ended before it: {why}"))

    async def run_pending(self, *, checkpoint: bool = False) -> None:
        """Answer the waiting clients; write a checkpoint also if the run wants one. RunFailed past its deadline."""
        if checkpoint or self._checkpoints:
            await self.write_checkpoint()
        if self._reloads:
            await self._reload()

    async def write_checkpoint(self) -> None:
        """Write the checkpoint of the last step, unless it exists, and answer the clients that wait for one."""
        step = self._run_store.version
        self.writing = True
        try:
            async with asyncio.timeout(self._deadline):
                written = await self._run_store.write_checkpoint(self._supervisor.services, step)
        except TimeoutError:
            raise RunFailed(f"checkpoint of step {step} not written within {self._deadline:g} s") from None
        finally:
            self.writing = False
        if written is not None:
            self._run_store.log.emit(written)
        waiting, self._checkpoints = self._checkpoints, []
        for future in _open(waiting):
            future.set_result(self._run_store.last_checkpoint)

    async def abandon_step(self) -> str:
        """Give up the step that is training and write the checkpoint of the last committed one, unless it exists.

        Step 0 needs none, the recipe has it. No model may have finished the step. Returns what happened, in words.
        """
        step, failed = self._run_store.version, ""
        if step:
            try:
                await self._save_committed(step)
            except (RunFailed, ServiceError, ExceptionGroup) as error:
                failed = f", no checkpoint of step {step}: {causes(error)}"
        last = self._run_store.last_checkpoint or "none, a resume starts from the beginning"
        return f"the step that was training is given up{failed}; last checkpoint: {last}"

    async def _save_committed(self, step: int) -> None:
        services = self._supervisor.services
        if not self._run_store.is_saved(step):
            try:
                async with asyncio.timeout(ABANDON_SECONDS), all_or_error() as group:
                    for name in self._run_store.stateful:
                        request = AbandonStep(step - self._started_at)
                        group.create_task(ask(services[name], request), name=f"abandon the step on {name}")
            except TimeoutError:
                stateful = ", ".join(self._run_store.stateful)
                raise RunFailed(f"no answer within {ABANDON_SECONDS:g} s from one of {stateful}") from None
        await self.write_checkpoint()

    async def _reload(self) -> None:
        waiting = list(self._reloads)
        try:
            answer = await self._switch_code()
        except BadCode as error:
            answer = error
        del self._reloads[: len(waiting)]  # only now: if the reload ends the run, `end` answers them
        for future in _open(waiting):
            if isinstance(answer, BadCode):
                future.set_exception(BadCode(str(answer)))
            else:
                future.set_result(answer)

    async def _switch_code(self) -> CodeReloaded:
        """Raises BadCode, with nothing changed, if a file can't be used."""
        step = self._run_store.version
        digests: dict[str, str] = {}
        try:
            sources = await asyncio.to_thread(self._code.changed)
            digests = {source.module: digest_of(source) for source in sources}
            if sources:
                await asyncio.to_thread(self._code.check, sources)
                await self._code.give(sources, self._supervisor.services)
        except BadCode as error:
            self._run_store.log.emit(CodeRefused(step=step, digests=digests, error=str(error)))
            raise
        reloaded = CodeReloaded(step=step, digests=digests)
        self._run_store.log.emit(reloaded)
        return reloaded


def _open(waiting: Iterable[asyncio.Future[A]]) -> list[asyncio.Future[A]]:
    """The futures whose clients still wait."""
    return [future for future in waiting if not future.done()]
