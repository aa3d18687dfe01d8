"""The controller: admission, the one batcher, versions, publication and the record of all of it.

    admit ──Prompts──> generate ──> ... ──> join ──Settled──> batcher
      ▲                                                          │ CloseBatch(k)
      │ budget                                                   ▼
    commit k  <── all trainers done, weights published  <── Experience ──> updates

It moves ids and references, never rows. What it decides is decided by pure functions (staleness.py, lease.py);
what it does is durable in the ledger before anything follows from it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from typing import Any

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.admission.staleness import Admission, CompletePrompt, check_age
from asyncflow.control.evaluation import Evaluator
from asyncflow.control.events import EventLog, Notifier
from asyncflow.control.prompt_dispatcher import PromptDispatcher
from asyncflow.control.settings import Deadlines, Evaluation, Pace
from asyncflow.control.step_boundary import StepBoundary
from asyncflow.control.store.ledger import LedgerError, State
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.outcome import RunFailed, outcome_of
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.supervision.watchdog import Watchdog
from asyncflow.control.train_step import Training
from asyncflow.control.user_code import UserCode
from asyncflow.dataflow.graph import Dataflow
from asyncflow.services.channels.endpoint import Endpoint, ServiceError, Store, ask, causes
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import (
    CodeReloaded,
    Evaluated,
    Event,
    RunEnded,
    SamplesEnded,
    ServiceReplaced,
    StateChanged,
    StepCommitted,
)
from protocols.control.notices import Busy, Generated, Notice, PromptSettled, StepDone
from protocols.control.requests import SetPaused
from protocols.data.ids import purpose_of
from protocols.weights import Version

TICK_SECONDS = 0.5


class Controller:
    """One run's decisions. `run` is called once."""

    def __init__(
        self,
        *,
        pace: Pace,
        deadlines: Deadlines,
        dataflow: Dataflow,
        fleet: ServiceSupervisor,
        generators: list[str],
        store: Store,
        source: PromptSource,
        evaluator: Evaluator | None,
        evaluation: Evaluation,
        record: RunStore,
        warnings: list[str],
        code: UserCode | None = None,
    ) -> None:
        self.events = EventLog()
        self._warnings = warnings
        self._pace, self._deadlines, self._dataflow = pace, deadlines, dataflow
        self._fleet, self._generators, self._record = fleet, generators, record
        self._evaluator, self._evaluation = evaluator, evaluation
        self._admission = Admission(pace.prompts_per_step, pace.staleness, pace.steps, record.version)
        self._prompts = InFlightPrompts(self._admission, pace.max_refills)
        self._pulse = Notifier()
        self._tokens_generated = 0
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._paused = False
        self._evaluating = False
        self._stopping = False
        self._over = False
        self._handing_out = PromptDispatcher(
            dataflow, fleet, generators, store, source, record, self._prompts, pace.samples_per_prompt
        )
        self._watchdog = Watchdog(fleet, deadlines, self.events, self._emit)
        self._training = Training(dataflow, fleet, generators, record, deadlines.publish, self._emit)
        self._between = StepBoundary(
            record, fleet, code or UserCode(), deadlines.checkpoint, self._emit, self._pulse.notify
        )

    # --- what a client may ask

    async def pause(self) -> None:
        """Stop admitting, drawing and forming batches; a step that is training is finished."""
        self._paused = True
        await self._tell_generators(SetPaused(True))
        self._emit(StateChanged(state="paused"))

    async def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._fleet.mark_progress()
        await self._tell_generators(SetPaused(False))
        self._emit(StateChanged(state="running"))
        self._pulse.notify()

    async def checkpoint(self) -> str:
        """Write a checkpoint at the next boundary between steps; its folder. RunFailed where the run ends first."""
        return await self._between.checkpoint()

    async def reload(self) -> CodeReloaded:
        """Have all services take the changed files of the user's code at the next boundary between steps.

        Raises BadCode, with nothing changed, where one of the files can't be used; RunFailed where the run ends first.
        """
        return await self._between.reload()

    async def statistics(self) -> list[ServiceStatistics]:
        """What the channels did so far, service by service. RunFailed where the run is over."""
        if self._over:
            raise RunFailed("the run is over: its services are gone")
        return await self._fleet.statistics()

    def stop(self) -> None:
        """Drain: finish the step that is training, write a checkpoint, end."""
        if not self._stopping and not self._over:
            self._stopping = True
            self._emit(StateChanged(state="draining"))
            self._pulse.notify()

    # --- the run

    async def run(self) -> RunEnded:
        """Run to the last step, or until stopped; the outcome says what happened, to every follower.

        Raises nothing but the CancelledError of its own task.
        """
        try:
            ended = await self._outcome()
        except asyncio.CancelledError:
            self._end(self._ended("stopped", 130, "ended at once, without draining"))
            await self._record.abandon()
            raise
        try:
            await self._record.finalize(ended)
        except Exception as error:  # noqa: BLE001 - it becomes the outcome
            code = 3 if isinstance(error, LedgerError) else max(ended.exit_code, 1)
            said = f"{ended.error}; and " if ended.error else ""
            ended = self._ended("failed", code, f"{said}closing the books: {causes(error)}")
        self._end(ended)
        return ended

    def _end(self, ended: RunEnded) -> None:
        """Tell everybody who follows the run or waits for something between its steps."""
        self._over = True
        self._between.end(ended.error or ended.outcome)
        self.events.add(ended)

    async def _outcome(self) -> RunEnded:
        try:
            return await self._run_tasks()
        except Exception as error:  # noqa: BLE001 - it becomes the outcome, and is logged whole where nobody foresaw it
            outcome = outcome_of(error)
            if outcome.unexpected:
                self._record.log_exception(error)
            return self._ended("failed", outcome.exit_code, outcome.text)

    async def _run_tasks(self) -> RunEnded:
        async with asyncio.TaskGroup() as group:
            background = self._fleet.follow(group, self._on_notice, self._replaced, self._complete_successor)
            background.append(group.create_task(self._watch(), name="watchdog"))
            background.append(group.create_task(self._tell_ended(), name="ended prompts"))
            train = group.create_task(self._drive(group, background), name="steps")
            outcome = await self._with_stop_deadline(train)
            for task in background:
                task.cancel()
        return outcome

    async def _with_stop_deadline(self, train: asyncio.Task[RunEnded]) -> RunEnded:
        while not train.done():
            await asyncio.wait({train}, timeout=TICK_SECONDS)
            if self._stopping and not train.done():
                if self._paused:  # an evaluation that the pause holds up would hold up the drain
                    await self._tell_generators(SetPaused(False))
                await asyncio.wait({train}, timeout=self._deadlines.stop)
                if not train.done():
                    train.cancel()
                    kept = self._record.last_checkpoint or "none"
                    return self._ended(
                        "stopped", 130, f"not drained within {self._deadlines.stop:g} s; last checkpoint: {kept}"
                    )
        return train.result()

    async def _drive(self, group: asyncio.TaskGroup, background: list[asyncio.Task[None]]) -> RunEnded:
        self._emit(self._record.started(self._pace.steps, list(self._fleet.services), self._warnings))
        await self._training.publish(self._version())
        if self._admission.version == 0 or self._evaluation.every:
            await self._evaluate()
        background.append(group.create_task(self._admit(), name="admission"))
        self._busy.clear()  # loading models is no part of the first step
        while self._admission.version < self._pace.steps:
            began = time.monotonic()
            batch = await self._form()
            if batch is None:
                await self._between.write_checkpoint()
                return self._ended("stopped", 130, "")
            await self._step(batch, time.monotonic() - began)
            await self._between_steps()
        await self._end_leftovers()
        await self._evaluate()
        await self._between.write_checkpoint()
        await self._record.export(self._fleet["policy"])
        return self._ended("finished", 0, "")

    # --- admission

    async def _admit(self) -> None:
        while True:
            await self._until(self._may_admit)
            await self._handing_out.admit(self._admission.room(), self._admission.version)

    def _may_admit(self) -> bool:
        if not self._admission.room() or self._paused or self._stopping:
            return False
        # What runs together decides the last bit: a deterministic wave is whole, and has the engine to itself.
        return not (self._pace.deterministic and (self._admission.incomplete or self._evaluating))

    # --- the batcher

    async def _form(self) -> list[CompletePrompt] | None:
        """The next batch, as soon as the rules let it be formed; None where the run is to stop instead."""
        chosen: list[CompletePrompt] | None = None

        def settled() -> bool:
            nonlocal chosen
            if self._paused and not self._stopping:
                return self._between.asked
            chosen = None if self._stopping else self._prompts.choose()
            return self._stopping or chosen is not None or self._between.asked

        while True:
            await self._until(settled)
            if self._between.asked:
                await self._between.do()
            elif self._stopping or chosen is not None:
                return chosen

    async def _step(self, batch: list[CompletePrompt], waited: float) -> None:
        """Train one batch on every trained model, publish, commit."""
        step = self._admission.version
        ages = check_age(batch, step, self._pace.staleness)
        settled = self._prompts.notices_of(batch)
        samples = [s for prompt in settled for s in prompt.alive]
        await self._record.batched(samples)
        metrics = await self._training.step(step, samples)
        metrics["wait.batch_seconds"] = waited
        metrics |= {f"busy.{service}_seconds": seconds for service, seconds in self._busy.items()}
        self._busy.clear()
        await self._commit(batch, samples, ages, metrics)

    async def _commit(
        self, batch: list[CompletePrompt], samples: list[int], ages: list[int], metrics: dict[str, float]
    ) -> None:
        settled = self._prompts.notices_of(batch)
        seconds = await self._record.commit(self._admission.version, samples)
        self._prompts.commit(batch)
        rewards = sum(p.reward_sum for p in settled)
        if costs := [p.cost_sum for p in settled if p.cost_sum is not None]:
            metrics |= {"cost_mean": sum(costs) / max(len(samples), 1)}
        event = StepCommitted(
            step=self._admission.version,
            version=str(self._version()),
            seconds=seconds,
            samples=len(samples),
            tokens_generated=sum(p.tokens for p in settled),
            reward_mean=rewards / max(len(samples), 1),
            kl=metrics.pop("kl", 0.0),
            loss=metrics.get("policy.loss", 0.0),
            staleness_max=max(ages),
            staleness_mean=sum(ages) / len(ages),
            metrics=metrics,
        )
        self._record.step_committed(event, ages, self._pace.samples_per_prompt)
        self._emit(event)
        self._pulse.notify()

    async def _between_steps(self) -> None:
        version = self._admission.version
        if version < self._pace.steps:
            if self._evaluation.every and version % self._evaluation.every == 0:
                await self._evaluate()
            await self._between.do(checkpoint=self._record.checkpoint_due(version))

    async def _end_leftovers(self) -> None:
        """A finished run has no live sample, also where it was resumed with fewer steps than it was admitted for."""
        self._prompts.close()
        await self._end_samples([(sample, "dropped", "run_ended") for sample in self._record.live])

    # --- versions, evaluation

    def _version(self) -> Version:
        return Version(self._record.term, self._admission.version)

    async def _evaluate(self) -> None:
        if self._evaluator is None or self._record.was_evaluated(self._admission.version):
            return
        self._evaluating = True
        evaluated = await self._evaluated(self._evaluator, self._generators[0])
        self._evaluating = False
        self._pulse.notify()
        self._record.evaluated(evaluated)
        self._emit(evaluated)

    async def _evaluated(self, evaluator: Evaluator, generator: str) -> Evaluated:
        """Once more where the generator's rows died with it: the answers are greedy, and the same."""
        while True:
            deaths = self._fleet.deaths(generator)
            try:
                return await evaluator.run(
                    self._fleet.with_retry(generator), self._fleet["evaluator"], self._admission.version
                )
            except ServiceError:
                if self._fleet.deaths(generator) == deaths:
                    raise
                await self._fleet.wait_healthy()

    async def _tell_generators(self, request: SetPaused) -> None:
        for name in self._generators:
            await self._fleet.tell(name, request)

    # --- what services report

    async def _on_notice(self, notice: Notice) -> None:
        match notice:
            case Busy():
                self._record.spent(notice.spans)
                for span in notice.spans:
                    self._busy[span.service] += span.end - span.start
            case PromptSettled():
                await self._on_prompt_settled(notice)
            case Generated():
                self._tokens_generated += notice.tokens
                self._record.generated([s for s in notice.sample_ids if purpose_of(s) == "train"])
            case StepDone():
                self._training.on_notice(notice)
        self._pulse.notify()

    def _replaced(self, event: ServiceReplaced) -> None:
        if event.service in self._generators:  # before it is handed anything
            self._handing_out.begin_anew()
        self._record.replaced(event.service)
        self._emit(event)
        self._pulse.notify()

    async def _complete_successor(self, successor: Endpoint) -> None:
        """Give a service that took a dead one's place what the others have: a generator, weights and work."""
        if successor.name in self._generators:
            await ask(successor, SetPaused(self._paused and not self._stopping))
            await self._training.catch_up(successor)
            await self._handing_out.regenerate()

    async def _on_prompt_settled(self, settled: PromptSettled) -> None:
        if not self._prompts.complete(settled):
            return
        if settled.trainable and not settled.dead:
            self._record.scored(settled.alive)
            return
        reason, cause = ("group_incomplete", settled.dead[0].cause) if settled.dead else ("no_signal", "no_signal")
        group: list[tuple[int, State, str]] = [(f.sample_id, "failed", f.cause) for f in settled.dead]
        await self._end_samples(group + [(sample, "dropped", reason) for sample in settled.alive])
        if rejects := self._prompts.rejects():
            raise RunFailed(f"{rejects}; last cause: {cause}")

    async def _end_samples(self, ended: list[tuple[int, State, str]]) -> None:
        """End a group, or what is left: in one transaction, so that no checkpoint holds half of it."""
        if not ended:
            return
        await self._record.end(ended)
        for (state, reason), count in Counter((state, reason) for _, state, reason in ended).items():
            assert state in ("dropped", "failed")
            self._emit(SamplesEnded(state=state, reason=reason, count=count))  # type: ignore[arg-type]

    async def _tell_ended(self) -> None:
        """Apart from the watchdog, which a service that does not answer must not hold up."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if over := self._prompts.take_finished():
                await self._fleet.end_prompts(over)

    # --- watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self._record.flush()
            self._watchdog.check(
                live_prompts=self._admission.live,
                step_progress=min(1.0, self._prompts.ready / self._pace.prompts_per_step),
                tokens=self._tokens_generated,
                paused=self._paused,
            )

    async def _until(self, predicate: Any) -> None:
        while not predicate():
            await self._pulse.changed()

    def _emit(self, event: Event) -> None:
        self._record.log(event)
        self.events.add(event)

    def _ended(self, outcome: Any, code: int, error: str) -> RunEnded:
        return RunEnded(outcome=outcome, step=self._admission.version, error=error, exit_code=code)
