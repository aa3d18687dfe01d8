"""One term of a run: the loops that make its steps, from a start, a resume or a rollback on.

    admission ──Prompts──> generate ──> ... ──> join ──PromptSettled──> steps
      ▲                                                          │ CloseBatch(k)
      │ budget                                                   ▼
    commit k  <── all models trained, weights published  <── Experience ──> updates

It moves ids and references, never rows. Its decisions are pure functions (admission/, device_lease.py). Its loops, each
a task; a `Notifier` wakes those that wait for its state:

    follow S           consumes the notices of service S (one loop a service, in service_supervisor.py)
                       waits for the next notice, a successor if S died, room in the queue of notices
                       unblocked by the service, the runtime, the loop "notices"
                       produces device grants, redeliveries, the wait-for graph; one queue of all other notices
    notices            consumes that queue (in notice_loop.py)
                       waits for a notice, the ledger; in a task a replaced service: its weights, its prompts
                       unblocked by the supervisor, the ledger's thread, the successor
                       produces complete prompts, ended samples, finished updates, successors that are ready
    admission          consumes the staleness budget and the prompts of the data file
                       waits for budget, and while the run is paused or (deterministic) evaluates
                       unblocked by a commit, a prompt that finished untrained, resume(), the end of an evaluation
                       produces samples in the ledger and Prompts for the generator
    steps              consumes complete prompts, and what clients ask for between two steps
                       waits for a batch, then for all updates and the publication
                       unblocked by PromptSettled and StepDone notices, loaded weights, checkpoint(), reload(), stop()
                       produces committed versions, evaluations, checkpoints, the outcome of the run
    finished prompts,  consume finished prompts and the time without progress
    watchdog           wait for the clock, the services' answers, the ledger's thread
                       unblocked by the clock, twice a second
                       produce EndPrompts requests; ledger flushes, WaitsChanged and Stalled events, RunFailed
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.admission.staleness import Admission, CompletePrompt
from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.drain import Drain
from asyncflow.control.evaluation import Evaluations
from asyncflow.control.generating_service import GeneratingService
from asyncflow.control.notice_loop import handle_notices
from asyncflow.control.settings import Deadlines, Pace
from asyncflow.control.step_boundary import StepBoundary
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.supervision.watchdog import Watchdog
from asyncflow.control.train_step import TrainStep
from asyncflow.control.user_code import UserCode
from asyncflow.dataflow.graph import Dataflow
from asyncflow.services.channels.endpoint import ServiceError, Store
from asyncflow.services.failpoints import reach
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import RunEnded

TICK_SECONDS = 0.5


class Term:
    """The run in one term. `run` is called once."""

    def __init__(
        self,
        *,
        pace: Pace,
        deadlines: Deadlines,
        dataflow: Dataflow,
        supervisor: ServiceSupervisor,
        generator: str,
        store: Store,
        source: PromptSource,
        evaluations: Evaluations,
        run_store: RunStore,
        code: UserCode,
        requests: ClientRequests,
    ) -> None:
        self.run_store = run_store
        self._pace, self._evaluations, self._requests = pace, evaluations, requests
        self._supervisor, self._changed = supervisor, requests.changed
        self._admission = Admission(pace.prompts_per_step, pace.staleness, pace.steps, run_store.version)
        self._inflight = inflight = InFlightPrompts(self._admission, pace.max_refills)
        self._generator = GeneratingService(
            generator,
            dataflow=dataflow,
            supervisor=supervisor,
            store=store,
            source=source,
            run_store=run_store,
            inflight=inflight,
            samples_per_prompt=pace.samples_per_prompt,
            publish_deadline_seconds=deadlines.publish,
        )
        self._train_step = TrainStep(pace, dataflow, supervisor, inflight, self._generator, run_store)
        self._boundary = StepBoundary(run_store, supervisor, code, requests, deadlines.checkpoint)
        self._drain = Drain(deadlines.stop, self._train_step, self._boundary, run_store, requests.abandons_step)
        self._watchdog = Watchdog(supervisor, deadlines)

    @property
    def version(self) -> int:
        """The number of committed steps."""
        return self._admission.version

    async def set_paused(self, paused: bool) -> None:
        """Have the generator stop, or go on, as the clients want it."""
        self._supervisor.mark_progress()
        with contextlib.suppress(ServiceError):  # the term is over: the next one begins as the clients want it
            await self._generator.set_paused(paused)

    async def statistics(self) -> list[ServiceStatistics]:
        """The channel statistics of every service so far."""
        return await self._supervisor.statistics()

    async def run(self) -> RunEnded:
        """Make steps to the last one, or until the run is stopped. Raises what ends the term before."""
        async with asyncio.TaskGroup() as group:
            background = self._supervisor.follow(group)
            background.append(group.create_task(self._handle_notices(), name="notices"))
            background.append(group.create_task(self._watch(), name="watchdog"))
            background.append(group.create_task(self._end_finished_prompts(), name="finished prompts"))
            steps = group.create_task(self._drive(group, background), name="steps")
            outcome = await self._with_stop_deadline(steps)
            for task in background:
                task.cancel()
        return outcome

    async def _with_stop_deadline(self, steps: asyncio.Task[RunEnded]) -> RunEnded:
        while not steps.done():
            await asyncio.wait({steps}, timeout=TICK_SECONDS)
            if self._requests.stopping and not steps.done():
                if self._requests.paused:  # a paused evaluation would hold up the drain
                    await self._generator.set_paused(False)
                if (given_up := await self._drain.wait(steps)) is not None:
                    code, error = given_up
                    return RunEnded(outcome="stopped", step=self.version, error=error, exit_code=code)
        return steps.result()

    # --- the steps

    async def _drive(self, group: asyncio.TaskGroup, background: list[asyncio.Task[None]]) -> RunEnded:
        await self._generator.publish(self.version)
        await self._generator.set_paused(self._requests.paused)  # what the term before has left may differ
        await self._evaluations.before_first_step()
        background.append(group.create_task(self._admit(), name="admission"))
        self.run_store.log.take_busy_seconds()  # loading models is no part of the first step
        while self.version < self._pace.steps:
            began = time.monotonic()
            batch = await self._form()
            if batch is None:
                reach("controller", "draining")
                await self._boundary.write_checkpoint()
                return RunEnded(outcome="stopped", step=self.version, exit_code=130)
            await self._train_step.run(batch, time.monotonic() - began)
            self._changed.notify()
            await self._between_steps()
        await self._end_leftovers()
        await self._evaluations.run()
        await self._boundary.write_checkpoint()
        await self.run_store.export(self._supervisor["policy"])
        return RunEnded(outcome="finished", step=self.version)

    async def _form(self) -> list[CompletePrompt] | None:
        """The next batch, as soon as the rules allow one; None if the run is to stop."""
        while True:
            if self._requests.pending:
                await self._boundary.run_pending()
            elif self._requests.stopping:
                return None
            elif not self._requests.paused and (batch := self._inflight.choose()) is not None:
                return batch
            else:
                await self._changed.changed()

    async def _between_steps(self) -> None:
        if self.version < self._pace.steps:
            await self._evaluations.after_step()
            self._changed.notify()  # admission may have waited for the end of the evaluation
            await self._boundary.run_pending(checkpoint=self.run_store.checkpoint_due(self.version))

    async def _end_leftovers(self) -> None:
        """End every live sample: a resumed run may have fewer steps than its samples were admitted for."""
        self._inflight.close()
        await self.run_store.end([(sample, "dropped", "run_ended") for sample in self.run_store.live])

    # --- the other loops

    async def _admit(self) -> None:
        while True:
            while not self._may_admit():
                await self._changed.changed()
            await self._generator.admit(self._admission.room(), self.version)

    def _may_admit(self) -> bool:
        if not self._admission.room() or self._requests.paused or self._requests.stopping:
            return False
        # Rows that are computed together decide each other's last bit: a deterministic run sends all prompts of a step
        # at once, and only while the engine has nothing else to do.
        return not (self._pace.deterministic and (self._admission.incomplete or self._evaluations.running))

    async def _handle_notices(self) -> None:
        store, changed = self.run_store, self._changed
        await handle_notices(
            self._supervisor, self._generator, self._inflight, self._train_step, self._watchdog, store, changed
        )

    async def _end_finished_prompts(self) -> None:
        """A loop of its own: a service that does not answer must not hold up the watchdog."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if finished := self._inflight.take_finished():
                await self._supervisor.end_prompts(finished)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.run_store.flush()
            progress = min(1.0, self._inflight.ready / self._pace.prompts_per_step)
            for event in self._watchdog.check(
                live_prompts=self._admission.live, step_progress=progress, paused=self._requests.paused
            ):
                self.run_store.log.emit(event)
