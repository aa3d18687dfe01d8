"""Sends prompts into the pipeline: records them in the ledger, then delivers them to every stage that generates.

The prompts that were live at a restored checkpoint are generated again before any new one. The same holds for prompts
whose rows died with a generator: they are sent under a new attempt, which voids every row of the old attempt that has
not reached the join.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.dataflow.graph import SOURCE, Dataflow
from asyncflow.services.channels.endpoint import Store
from asyncflow.services.channels.shard_refs import pack
from protocols.control.delivery import Delivery
from protocols.data.ids import sample_id


class PromptDispatcher:
    """The prompts of one run, in the order in which they are admitted."""

    def __init__(
        self,
        dataflow: Dataflow,
        supervisor: ServiceSupervisor,
        generator: str,
        store: Store,
        source: PromptSource,
        run_store: RunStore,
        inflight: InFlightPrompts,
        samples_per_prompt: int,
    ) -> None:
        self._dataflow, self._supervisor, self._generator, self._store = dataflow, supervisor, generator, store
        self._source, self._run_store, self._inflight, self._samples = source, run_store, inflight, samples_per_prompt
        self._restarted = run_store.restarted_prompts()

    @property
    def _attempt(self) -> int:
        """Rises when the generator is replaced, before its successor is sent anything."""
        return self._supervisor.replacements[self._generator]

    async def admit(self, room: int, min_version: int) -> None:
        """Send the next `room` prompts, to be generated with weights of step `min_version` or newer."""
        again, self._restarted = self._restarted[:room], self._restarted[room:]
        fresh = [self._source.at(self._run_store.cursor + i) for i in range(room - len(again))]
        samples = [sample_id(prompt, i) for prompt in fresh for i in range(self._samples)]
        await self._run_store.admit(samples, min_version, self._run_store.cursor + len(fresh))
        self._inflight.admit(again + fresh)
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
            await self._supervisor.deliver(self._generator, delivery, [part.payload])
