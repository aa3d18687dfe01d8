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


async def handle_notices(
    supervisor: ServiceSupervisor,
    generator: GeneratingService,
    inflight: InFlightPrompts,
    train_step: TrainStep,
    watchdog: Watchdog,
    run_store: RunStore,
    changed: Notifier,
) -> None:
    """Handle the notices that the supervisor passes on, in their order, until cancelled.

    Raises RunFailed if a step rejects too many prompts.
    """
    async with asyncio.TaskGroup() as group:
        while True:
            notice = await supervisor.notices.get()
            match notice:
                case Busy():
                    run_store.log.add_spans(notice.spans)
                case Generated():
                    watchdog.generated(notice.tokens)
                    run_store.generated([s for s in notice.sample_ids if purpose_of(s) == "train"])
                case PromptSettled():
                    await _complete(notice, inflight, run_store)
                case StepDone():
                    train_step.on_notice(notice)
                case Replaced():
                    run_store.log.emit(notice.event)
                    if notice.event.service == train_step.join:  # before its successor reports a prompt
                        inflight.mark_incomplete(train_step.prompts)
                    prepared = _prepare(notice, supervisor, generator)
                    group.create_task(prepared, name=f"prepare {notice.event.service}")
            changed.notify()


async def _complete(notice: PromptSettled, inflight: InFlightPrompts, run_store: RunStore) -> None:
    """All rows of a prompt are at the join: it can be trained, or its samples end."""
    if not inflight.complete(notice):
        return
    if notice.trains:
        run_store.scored(notice.alive)
        return
    ended = ended_samples(notice)
    await run_store.end(ended)
    if rejects := inflight.rejects():
        raise RunFailed(f"{rejects}; last cause: {ended[0][2]}")


async def _prepare(replaced: Replaced, supervisor: ServiceSupervisor, generator: GeneratingService) -> None:
    async with supervisor.on_replaced(replaced) as successor:
        if successor.name == generator.name:
            await generator.prepare(successor)
