"""What the controller sends to the service that generates, or to its successor: prompts, weights, pauses.

Prompts are recorded in the ledger, then delivered to every stage that generates. The prompts that were live at a
restored checkpoint are generated again before any new one. The same holds for prompts whose rows died with a generator:
they are sent under a new attempt, which voids every row of the old attempt that has not reached the join.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.dataflow.graph import SOURCE, Dataflow
from asyncflow.services.channels.endpoint import Endpoint, Store, ask
from asyncflow.services.channels.shard_refs import pack
from asyncflow.services.failpoints import reach
from asyncflow.services.weight_sync import PublicationFailed, Snapshot, install, publish
from protocols.control.delivery import Delivery
from protocols.control.events import Published
from protocols.control.requests import SetPaused
from protocols.data.ids import sample_id
from protocols.weights import Version


class GeneratingService:
    """The generator of one run, which may be the policy itself, and the order in which its prompts are admitted."""

    def __init__(
        self,
        name: str,
        *,
        dataflow: Dataflow,
        supervisor: ServiceSupervisor,
        store: Store,
        source: PromptSource,
        run_store: RunStore,
        inflight: InFlightPrompts,
        samples_per_prompt: int,
        publish_deadline_seconds: float,
    ) -> None:
        self.name = name
        self._dataflow, self._supervisor, self._store, self._source = dataflow, supervisor, store, source
        self._run_store, self._inflight, self._samples = run_store, inflight, samples_per_prompt
        self._deadline = publish_deadline_seconds
        self._restarted = run_store.restarted_prompts()
        self._paused = False
        self._newest: Snapshot | None = None  # the newest weights that it has loaded

    # --- prompts

    @property
    def _attempt(self) -> int:
        """Rises when the generator is replaced, before its successor is sent anything."""
        return self._supervisor.replacements[self.name]

    async def admit(self, room: int, min_version: int) -> None:
        """Send the next `room` prompts, to be generated with weights of step `min_version` or newer."""
        again, self._restarted = self._restarted[:room], self._restarted[room:]
        fresh = [self._source.at(self._run_store.cursor + i) for i in range(room - len(again))]
        samples = [sample_id(prompt, i) for prompt in fresh for i in range(self._samples)]
        await self._run_store.admit(samples, min_version, self._run_store.cursor + len(fresh))
        self._inflight.admit(again + fresh)
        reach("controller", "admitted")
        await self._send(again + fresh, min_version)

    async def regenerate(self) -> None:
        """Send the prompts that a dead generator had. A prompt whose rows are all at the join is not sent again.

        Prompts that its successor received before are refused there, because they have the same attempt.
        """
        lost = self._inflight.incomplete
        await self._run_store.regenerate([sample_id(prompt, i) for prompt in lost for i in range(self._samples)])
        by_min_version: defaultdict[int, list[int]] = defaultdict(list)
        for prompt, min_version in lost.items():
            by_min_version[min_version].append(prompt)
        for min_version, prompts in by_min_version.items():
            await self._send(prompts, min_version)

    async def _send(self, prompts: list[int], min_version: int) -> None:
        for channel in self._dataflow.consumers(SOURCE):
            greedy = self._dataflow.stage(channel.destination).greedy
            rows = (
                self._source.baselines(prompts, min_version)
                if greedy
                else self._source.requests(prompts, self._samples, min_version)
            )
            attempt = self._attempt
            part = await asyncio.to_thread(pack, self._store, rows, self._run_store.term, attempt)
            if attempt != self._attempt:
                return  # the prompts are in flight, so `regenerate` sends them under the new attempt
            delivery = Delivery(channel.edge, self._run_store.term, [part.shard], attempt=attempt)
            await self._supervisor.deliver(self.name, delivery, [part.payload])

    # --- pauses and weights

    async def set_paused(self, paused: bool) -> None:
        """Have it stop generating, or continue."""
        self._paused = paused
        await self._supervisor.tell(self.name, SetPaused(paused))

    async def publish(self, step: int) -> Published | None:
        """Have it load the policy's weights of a step; None if it is the policy."""
        if self.name == "policy":
            return None
        await self._supervisor.wait_healthy()  # a starting successor has a deadline of its own
        replica = self._supervisor.with_retry(self.name)
        version = Version(self._run_store.term, step)
        published, self._newest = await publish(self._supervisor["policy"], [replica], version, self._deadline)
        self._run_store.log.emit(published)
        return published

    async def prepare(self, successor: Endpoint) -> None:
        """Give its successor the state that it had, then the prompts whose rows are lost.

        Raises PublicationFailed if the successor does not load the weights in time.
        """
        await ask(successor, SetPaused(self._paused))
        if self._newest is not None:
            try:
                async with asyncio.timeout(self._deadline):
                    await install(successor, self._newest)
            except TimeoutError:
                raise PublicationFailed(
                    f"version {self._newest.manifest.version}: {successor.name}, which was replaced, has not loaded it "
                    f"within {self._deadline:g} s"
                ) from None
        await self.regenerate()
