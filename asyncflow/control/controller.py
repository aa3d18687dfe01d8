"""The controller: decides what is generated, trained, published and committed, and records it before it has effects.

    admission ──Prompts──> generate ──> ... ──> join ──PromptSettled──> steps
      ▲                                                          │ CloseBatch(k)
      │ budget                                                   ▼
    commit k  <── all models trained, weights published  <── Experience ──> updates

It moves ids and references, never rows. Its decisions are pure functions (admission/, device_lease.py,
restart_policy.py). Its loops, each a task; a `Notifier` wakes those that wait for its state:

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
import time
from typing import Literal

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.admission.staleness import Admission, CompletePrompt
from asyncflow.control.drain import Drain
from asyncflow.control.evaluation import Evaluations
from asyncflow.control.events import Notifier
from asyncflow.control.generating_service import GeneratingService
from asyncflow.control.notice_loop import handle_notices
from asyncflow.control.settings import Deadlines, Pace
from asyncflow.control.step_boundary import StepBoundary
from asyncflow.control.store.ledger import LedgerError
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.store.storage import StorageFailed, is_shortage
from asyncflow.control.supervision.outcome import RunFailed, outcome_of
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.supervision.watchdog import Watchdog
from asyncflow.control.train_step import TrainStep
from asyncflow.control.user_code import UserCode
from asyncflow.dataflow.graph import Dataflow
from asyncflow.services.channels.endpoint import Store, causes
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, RunEnded, RunStarted, StateChanged

TICK_SECONDS = 0.5


class Controller:
    """One run's decisions. `run` is called once."""

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
        started: RunStarted,
    ) -> None:
        """`started` is the run's first event."""
        self.events = run_store.log.events
        self._pace, self._deadlines, self._evaluations, self._started = pace, deadlines, evaluations, started
        self._supervisor, self._run_store = supervisor, run_store
        self._admission = Admission(pace.prompts_per_step, pace.staleness, pace.steps, run_store.version)
        self._inflight = inflight = InFlightPrompts(self._admission, pace.max_refills)
        self._changed = Notifier()
        self._paused = False
        self._stopping = False
        self._over = False
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
        self._boundary = StepBoundary(run_store, supervisor, code, deadlines.checkpoint, self._changed)
        self._drain = Drain(deadlines.stop, self._train_step, self._boundary, run_store)
        self._watchdog = Watchdog(supervisor, deadlines)

    # --- requests of clients

    async def pause(self) -> None:
        """Stop admitting, generating and forming batches; a step that is training is finished."""
        self._paused = True
        await self._generator.set_paused(True)
        self._run_store.log.emit(StateChanged(state="paused"))

    async def resume(self) -> None:
        """Continue after a pause."""
        self._paused = False
        self._supervisor.mark_progress()
        await self._generator.set_paused(False)
        self._run_store.log.emit(StateChanged(state="running"))
        self._changed.notify()

    async def checkpoint(self) -> str:
        """Write a checkpoint at the next boundary between steps; its folder. RunFailed if the run ends first."""
        return await self._boundary.checkpoint()

    async def reload(self) -> CodeReloaded:
        """Have all services take the changed files of the user's code at the next boundary between steps.

        Raises BadCode, with nothing changed, if one of the files can't be used; RunFailed if the run ends first.
        """
        return await self._boundary.reload()

    async def statistics(self) -> list[ServiceStatistics]:
        """The channel statistics of every service so far. RunFailed if the run is over."""
        if self._over:
            raise RunFailed("the run is over: its services are gone")
        return await self._supervisor.statistics()

    def stop(self, *, abandon: bool = False) -> None:
        """Drain: finish the step that is training, write a checkpoint, end.

        `abandon`: give that step up now, not at the deadline, unless a model has finished it; also during a drain.
        """
        if not self._stopping and not self._over:
            self._stopping = True
            self._run_store.log.emit(StateChanged(state="draining"))
            self._changed.notify()
        if abandon:
            self._drain.abandon()

    # --- the run

    async def run(self) -> RunEnded:
        """Run to the last step, or until stopped. Returns the outcome, which every follower gets, too.

        Raises nothing but the CancelledError of its own task.
        """
        try:
            ended = await self._outcome()
        except asyncio.CancelledError:
            self._end(self._ended("stopped", 130, "ended at once, without draining"))
            await self._run_store.abandon()
            raise
        try:
            await self._run_store.finalize(ended)
        except Exception as error:  # noqa: BLE001 - it becomes the outcome
            code = 3 if isinstance(error, LedgerError) else max(ended.exit_code, 1)
            text = str(error) if isinstance(error, StorageFailed) else f"finalizing the run folder: {causes(error)}"
            # A disk that is full says so at each write: once is enough.
            first = ended.error if ended.error and is_shortage(ended.error) and is_shortage(text) else ""
            ended = self._ended("failed", code, first or "; and ".join(filter(None, [ended.error, text])))
        self._end(ended)
        return ended

    def _end(self, ended: RunEnded) -> None:
        self._over = True
        self._boundary.end(ended.error or ended.outcome)
        self._run_store.log.emit(ended)

    async def _outcome(self) -> RunEnded:
        try:
            return await self._run_tasks()
        except Exception as error:  # noqa: BLE001 - it becomes the outcome
            outcome = outcome_of(error)
            if outcome.unexpected:
                self._run_store.log.file.exception("an unexpected error ends the run")
            return self._ended("failed", outcome.exit_code, outcome.text)

    async def _run_tasks(self) -> RunEnded:
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
            if self._stopping and not steps.done():
                if self._paused:  # a paused evaluation would hold up the drain
                    await self._generator.set_paused(False)
                if (given_up := await self._drain.wait(steps)) is not None:
                    return self._ended("stopped", *given_up)
        return steps.result()

    def _ended(self, outcome: Literal["finished", "stopped", "failed"], code: int, error: str) -> RunEnded:
        return RunEnded(outcome=outcome, step=self._admission.version, error=error, exit_code=code)

    # --- the steps

    async def _drive(self, group: asyncio.TaskGroup, background: list[asyncio.Task[None]]) -> RunEnded:
        self._run_store.log.emit(self._started)
        await self._generator.publish(self._admission.version)
        await self._evaluations.before_first_step()
        background.append(group.create_task(self._admit(), name="admission"))
        self._run_store.log.take_busy_seconds()  # loading models is no part of the first step
        while self._admission.version < self._pace.steps:
            began = time.monotonic()
            batch = await self._form()
            if batch is None:
                await self._boundary.write_checkpoint()
                return self._ended("stopped", 130, "")
            await self._train_step.run(batch, time.monotonic() - began)
            self._changed.notify()
            await self._between_steps()
        await self._end_leftovers()
        await self._evaluations.run()
        await self._boundary.write_checkpoint()
        await self._run_store.export(self._supervisor["policy"])
        return self._ended("finished", 0, "")

    async def _form(self) -> list[CompletePrompt] | None:
        """The next batch, as soon as the rules allow one; None if the run is to stop."""
        while True:
            if self._boundary.pending:
                await self._boundary.run_pending()
            elif self._stopping:
                return None
            elif not self._paused and (batch := self._inflight.choose()) is not None:
                return batch
            else:
                await self._changed.changed()

    async def _between_steps(self) -> None:
        version = self._admission.version
        if version < self._pace.steps:
            await self._evaluations.after_step()
            self._changed.notify()  # admission may have waited for the end of the evaluation
            await self._boundary.run_pending(checkpoint=self._run_store.checkpoint_due(version))

    async def _end_leftovers(self) -> None:
        """End every live sample: a resumed run may have fewer steps than its samples were admitted for."""
        self._inflight.close()
        await self._run_store.end([(sample, "dropped", "run_ended") for sample in self._run_store.live])

    # --- the other loops

    async def _admit(self) -> None:
        while True:
            while not self._may_admit():
                await self._changed.changed()
            await self._generator.admit(self._admission.room(), self._admission.version)

    def _may_admit(self) -> bool:
        if not self._admission.room() or self._paused or self._stopping:
            return False
        # Rows that are computed together decide each other's last bit: a deterministic run sends all prompts of a step
        # at once, and only while the engine has nothing else to do.
        return not (self._pace.deterministic and (self._admission.incomplete or self._evaluations.running))

    async def _handle_notices(self) -> None:
        run_store, changed = self._run_store, self._changed
        await handle_notices(
            self._supervisor, self._generator, self._inflight, self._train_step, self._watchdog, run_store, changed
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
            await self._run_store.flush()
            progress = min(1.0, self._inflight.ready / self._pace.prompts_per_step)
            for event in self._watchdog.check(
                live_prompts=self._admission.live, step_progress=progress, paused=self._paused
            ):
                self._run_store.log.emit(event)
