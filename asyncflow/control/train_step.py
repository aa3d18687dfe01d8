"""One training step: a batch goes through every trained model, its weights are published, the step is committed.

    CloseBatch(k) ──> join ──Experience──> policy.update ──> published as version k + 1 ─┬─> commit of step k
                                     └───> critic.update ──────────────────────────────┘

Weights may be published before the critics are done; the step is committed when all models are.
"""

from __future__ import annotations

import asyncio

from asyncflow.control.admission.inflight_prompts import InFlightPrompts, failed_samples
from asyncflow.control.admission.staleness import CompletePrompt, check_age
from asyncflow.control.generating_service import GeneratingService
from asyncflow.control.reward_warnings import reward_warning
from asyncflow.control.settings import Pace
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.dataflow.graph import Dataflow
from asyncflow.observe.memory import by_service
from asyncflow.services.channels.endpoint import ask
from asyncflow.services.failpoints import reach
from protocols.control.events import StepCommitted, Warned
from protocols.control.notices import PromptSettled, StepDone
from protocols.control.replies import BatchClosed
from protocols.control.requests import CloseBatch
from protocols.control.samples import ShownSample
from protocols.weights import Version


class TrainStep:
    """Trains the batches of one run, one at a time."""

    def __init__(
        self,
        pace: Pace,
        dataflow: Dataflow,
        supervisor: ServiceSupervisor,
        inflight: InFlightPrompts,
        generator: GeneratingService,
        run_store: RunStore,
    ) -> None:
        self._pace, self._dataflow, self._supervisor = pace, dataflow, supervisor
        self._inflight, self._generator, self._run_store = inflight, generator, run_store
        self._updates: dict[tuple[str, int], asyncio.Future[StepDone]] = {}  # (stage, step)
        # A model has finished the step that is training: it can't go back, so the step has to be finished.
        self.partly_done = False
        self.prompts: frozenset[int] = frozenset()  # of the step that is training

    @property
    def join(self) -> str:
        """The service that joins the rows of a batch and closes it."""
        return self._dataflow.batch_stage.service

    def on_notice(self, done: StepDone) -> None:
        """A trained model has finished its batch."""
        update = self._updates[done.stage, done.step]
        if not update.done():  # cancelled, where the step was abandoned
            update.set_result(done)
            self.partly_done = True

    async def run(self, batch: list[CompletePrompt], waited_seconds: float) -> None:
        """Train one batch, publish the weights and commit the step. `waited_seconds`: until the batch was complete."""
        step = self._inflight.admission.version
        self.prompts = frozenset(prompt.prompt_id for prompt in batch)
        ages = check_age(batch, step, self._pace.staleness)
        notices = self._inflight.notices_of(batch)
        samples = [sample for notice in notices for sample in notice.alive]
        await self._run_store.batched(samples)
        # Not before: had the join lost these rows, the samples that failed might have been scored the next time.
        await self._run_store.end(failed_samples(notices))
        metrics, shown = await self._train(step, samples)
        metrics["wait.batch_seconds"] = waited_seconds
        busy = self._run_store.log.take_busy_seconds()
        metrics |= {f"busy.{service}_seconds": seconds for service, seconds in busy.items()}
        metrics |= by_service(self._supervisor.silences.memory)
        tokens = sum(notice.tokens for notice in notices)
        metrics["tokens_total"] = self._run_store.log.tokens + tokens
        reach("controller", "committing")
        seconds = await self._run_store.commit(step, samples)
        self._inflight.commit(batch)
        self.partly_done, self.prompts = False, frozenset()
        self._run_store.log.observe_staleness(ages, [len(notice.alive) for notice in notices])
        version = Version(self._run_store.term, step + 1)
        event = _event(version, seconds, notices, ages, metrics)
        self._run_store.log.emit(event)
        if shown:
            self._run_store.log.add_samples(event.step, shown)
        compares = self._pace.compares_samples
        text = reward_warning(event.step, event.samples, len(notices), event.metrics, compares_samples=compares)
        if text:
            self._run_store.log.emit(Warned(step=event.step, text=text))

    async def _train(self, step: int, samples: list[int]) -> tuple[dict[str, float], list[ShownSample]]:
        """Train these samples in this order and publish the weights. Returns the metrics, and some samples as text."""
        for sink in self._dataflow.sinks:
            self._updates[sink.name, step] = asyncio.get_running_loop().create_future()
        # A successor of the join closes the batch again; a model that has it already refuses it, by its step.
        closed, _ = await ask(self._supervisor.with_retry(self.join), CloseBatch(step, samples))
        assert isinstance(closed, BatchClosed)
        metrics = dict(closed.values)
        for stage in sorted(self._dataflow.sinks, key=lambda sink: sink.service != "policy"):
            done = await self._updates[stage.name, step]
            metrics |= {f"{stage.service}.{name}": value for name, value in done.values.items()}
            if stage.service == "policy":
                published = await self._generator.publish(step + 1)
                metrics["publish_seconds"] = published.seconds if published else 0.0
        for stage in self._dataflow.sinks:
            del self._updates[stage.name, step]
        return metrics, closed.samples


def _event(
    version: Version, seconds: float, notices: list[PromptSettled], ages: list[int], metrics: dict[str, float]
) -> StepCommitted:
    samples = sum(len(notice.alive) for notice in notices)
    rewards = sum(notice.reward_sum for notice in notices)
    if costs := [notice.cost_sum for notice in notices if notice.cost_sum is not None]:
        metrics |= {"cost_mean": sum(costs) / max(samples, 1)}
    return StepCommitted(
        step=version.step,
        version=str(version),
        seconds=seconds,
        samples=samples,
        tokens_generated=sum(notice.tokens for notice in notices),
        reward_mean=rewards / max(samples, 1),
        kl=metrics.pop("kl", 0.0),
        loss=metrics.get("policy.loss", 0.0),
        staleness_max=max(ages),
        staleness_mean=sum(ages) / len(ages),
        metrics=metrics,
    )
