"""The loop over the services' notices: each one changes the state of the run, then wakes the loops that wait for it."""

from __future__ import annotations

import asyncio

from asyncflow.control.admission.inflight_prompts import InFlightPrompts, ended_samples
from asyncflow.control.events import Notifier
from asyncflow.control.generating_service import GeneratingService
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import Replaced, ServiceSupervisor
from asyncflow.control.supervision.watchdog import Watchdog
from asyncflow.control.train_step import TrainStep
from protocols.control.notices import Busy, Generated, PromptSettled, StepDone
from protocols.data.ids import purpose_of


class NoticeLoop:
    """Handles the notices that the supervisor passes on, in their order."""

    def __init__(
        self,
        supervisor: ServiceSupervisor,
        generator: GeneratingService,
        inflight: InFlightPrompts,
        train_step: TrainStep,
        watchdog: Watchdog,
        run_store: RunStore,
        changed: Notifier,
    ) -> None:
        self._supervisor, self._generator, self._inflight = supervisor, generator, inflight
        self._train_step, self._watchdog, self._run_store, self._changed = train_step, watchdog, run_store, changed

    async def run(self) -> None:
        """Run until cancelled. Raises RunFailed if a step rejects too many prompts."""
        async with asyncio.TaskGroup() as group:
            while True:
                notice = await self._supervisor.notices.get()
                match notice:
                    case Busy():
                        self._run_store.log.add_spans(notice.spans)
                    case Generated():
                        self._watchdog.generated(notice.tokens)
                        self._run_store.generated([s for s in notice.sample_ids if purpose_of(s) == "train"])
                    case PromptSettled():
                        await self._complete(notice)
                    case StepDone():
                        self._train_step.on_notice(notice)
                    case Replaced():
                        self._run_store.log.emit(notice.event)
                        group.create_task(self._prepare(notice), name=f"prepare {notice.event.service}")
                self._changed.notify()

    async def _complete(self, notice: PromptSettled) -> None:
        """All rows of a prompt are at the join: it can be trained, or its samples end."""
        if not self._inflight.complete(notice):
            return
        if notice.trainable and not notice.dead:
            self._run_store.scored(notice.alive)
            return
        ended = ended_samples(notice)
        await self._run_store.end(ended)
        if rejects := self._inflight.rejects():
            raise RunFailed(f"{rejects}; last cause: {ended[0][2]}")

    async def _prepare(self, replaced: Replaced) -> None:
        async with self._supervisor.on_replaced(replaced) as successor:
            if successor.name == self._generator.name:
                await self._generator.prepare(successor)
