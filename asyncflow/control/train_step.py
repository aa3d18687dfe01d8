"""One batch through every trained model: closed at the join, trained by all sinks, its weights published.

    CloseBatch(k) ──> join ──Experience──> policy.update ──> published as version k + 1 ─┬─> the step is done
                                     └───> critic.update ──────────────────────────────┘

Weights may go out before the critics are done; the step is done when all are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.dataflow.graph import Dataflow
from asyncflow.services.channels.endpoint import Endpoint, ask
from asyncflow.services.weight_sync import PublicationFailed, Snapshot, install, publish
from protocols.control.events import Event, Published
from protocols.control.notices import StepDone
from protocols.control.requests import CloseBatch, Done
from protocols.weights import Version


class Training:
    """The trained models of one run, as the steps see them."""

    def __init__(
        self,
        dataflow: Dataflow,
        fleet: ServiceSupervisor,
        generators: Sequence[str],
        record: RunStore,
        deadline_seconds: float,  # of a publication
        emit: Callable[[Event], None],
    ) -> None:
        self._dataflow, self._fleet, self._record = dataflow, fleet, record
        self._sinks = [name for name in generators if name != "policy"]  # of weights; the policy has its own
        self._deadline, self._emit = deadline_seconds, emit
        self._done: dict[tuple[str, int], asyncio.Future[StepDone]] = {}
        self._newest: Snapshot | None = None  # that all generators have

    def on_notice(self, done: StepDone) -> None:
        """A trained model has finished its batch."""
        self._done[done.stage, done.step].set_result(done)

    async def step(self, step: int, samples: list[int]) -> dict[str, float]:
        """Train these samples, in this order, and publish what comes of it; what was measured."""
        for sink in self._dataflow.sinks:
            self._done[sink.name, step] = asyncio.get_running_loop().create_future()
        closed, _ = await ask(self._fleet[self._dataflow.batch_stage.service], CloseBatch(step, samples))
        assert isinstance(closed, Done)
        metrics = dict(closed.values)
        for stage in sorted(self._dataflow.sinks, key=lambda sink: sink.service != "policy"):
            done = await self._done[stage.name, step]
            metrics |= {f"{stage.service}.{name}": value for name, value in done.values.items()}
            if stage.service == "policy":
                published = await self.publish(Version(self._record.term, step + 1))
                metrics["publish_seconds"] = published.seconds if published else 0.0
        for stage in self._dataflow.sinks:
            del self._done[stage.name, step]
        return metrics

    async def publish(self, version: Version) -> Published | None:
        """Have every generator install the policy's weights; None where the policy itself generates."""
        if not self._sinks:
            return None
        await self._fleet.wait_healthy()  # a successor that is starting has a deadline of its own
        sinks = [self._fleet.with_retry(name) for name in self._sinks]
        published, self._newest = await publish(self._fleet["policy"], sinks, version, self._deadline)
        self._record.published(published)
        self._emit(published)
        return published

    async def catch_up(self, generator: Endpoint) -> None:
        """Give a generator that has taken a dead one's place the weights that the others have.

        Raises PublicationFailed where it does not take them in time.
        """
        if self._newest is None:
            return
        try:
            async with asyncio.timeout(self._deadline):
                await install(generator, self._newest)
        except TimeoutError:
            raise PublicationFailed(
                f"version {self._newest.manifest.version}: {generator.name}, which was replaced, has not loaded it "
                f"within {self._deadline:g} s"
            ) from None
