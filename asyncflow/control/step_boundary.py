"""What clients ask for between two steps: checkpoints, and reloads of the user's own code.

No batch is closed and nothing trains meanwhile; generation goes on. Every client gets an answer, or RunFailed if the
run ends first.
"""

from __future__ import annotations

import asyncio

from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.user_code import UserCode
from asyncflow.services.channels.endpoint import ServiceError, all_or_error, ask, causes
from protocols.control.events import CodeRefused, CodeReloaded
from protocols.control.requests import AbandonStep
from workers.user_code import BadCode, digest_of

ABANDON_SECONDS = 30.0  # a service gives up a step at once, beside its computing, or does not answer at all


class StepBoundary:
    """The boundary between the steps of one term. Nothing is waited for here but what clients asked for."""

    def __init__(
        self,
        run_store: RunStore,
        supervisor: ServiceSupervisor,
        code: UserCode,
        requests: ClientRequests,
        checkpoint_deadline_seconds: float,
    ) -> None:
        self._run_store, self._supervisor, self._code = run_store, supervisor, code
        self._requests, self._deadline = requests, checkpoint_deadline_seconds
        self._started_at = run_store.version
        self.writing = False  # a checkpoint

    async def run_pending(self, *, checkpoint: bool = False) -> None:
        """Answer the waiting clients; write a checkpoint also if the run wants one. RunFailed past its deadline."""
        if checkpoint or self._requests.wants_checkpoint:
            await self.write_checkpoint()
        if waiting := self._requests.reloads:
            await self._reload(waiting)

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
        self._requests.answer_checkpoints(self._run_store.last_checkpoint)

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

    async def _reload(self, waiting: int) -> None:
        try:
            answer = await self._switch_code()
        except BadCode as error:
            answer = error
        self._requests.answer_reloads(waiting, answer)  # only now: if it ends the term, the next one answers them

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
