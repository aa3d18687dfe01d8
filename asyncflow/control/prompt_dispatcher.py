"""Prompts on their way into the pipeline: made durable in the ledger, then handed to every stage that generates.

What was live at the checkpoint that a run goes on from is drawn again before anything new. So is what a generator had
drawn whose process is gone, for its rows are gone with it: under a new attempt, which makes void whatever was made of
the old one and has not reached the join.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

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
    """The prompts of one run, in their order."""

    def __init__(
        self,
        dataflow: Dataflow,
        fleet: ServiceSupervisor,
        generators: Sequence[str],
        store: Store,
        source: PromptSource,
        record: RunStore,
        book: InFlightPrompts,
        samples_per_prompt: int,
    ) -> None:
        self._dataflow, self._fleet, self._generators, self._store = dataflow, fleet, generators, store
        self._source, self._record, self._book, self._samples = source, record, book, samples_per_prompt
        self._restarted = record.restarted_prompts()
        self._attempt = 0

    async def admit(self, room: int, min_version: int) -> None:
        """The next `room` prompts, for weights of step `min_version` at least."""
        again, self._restarted = self._restarted[:room], self._restarted[room:]
        fresh = [self._source.at(self._record.cursor + i) for i in range(room - len(again))]
        samples = [sample_id(prompt, i) for prompt in fresh for i in range(self._samples)]
        await self._record.admit(samples, min_version, self._record.cursor + len(fresh))
        self._book.admit(again + fresh)
        await self._hand_out(again + fresh, min_version)

    def begin_anew(self) -> None:
        """A generator is gone, and what it held: from now on prompts go out under a new attempt."""
        self._attempt += 1

    async def regenerate(self) -> None:
        """Hand out what a lost generator had. A prompt whose rows are all at the join needs nothing of it.

        Prompts that its successor was handed before are refused there, being of the same attempt.
        """
        lost = self._book.incomplete
        await self._record.regenerate([sample_id(prompt, i) for prompt in lost for i in range(self._samples)])
        by_min_version: defaultdict[int, list[int]] = defaultdict(list)
        for prompt, min_version in lost.items():
            by_min_version[min_version].append(prompt)
        for min_version, prompts in by_min_version.items():
            await self._hand_out(prompts, min_version)

    async def _hand_out(self, prompts: list[int], min_version: int) -> None:
        for channel in self._dataflow.consumers(SOURCE):
            greedy = self._dataflow.stage(channel.destination).greedy
            rows = (
                self._source.baselines(prompts, min_version)
                if greedy
                else self._source.requests(prompts, self._samples, min_version)
            )
            attempt = self._attempt
            part = await asyncio.to_thread(pack, self._store, rows, self._record.term, attempt)
            if attempt != self._attempt:
                return  # they are in the book, from which they go out under the new one
            for generator in self._generators:
                delivery = Delivery(channel.edge, self._record.term, [part.shard], attempt=attempt)
                await self._fleet.deliver(generator, delivery, [part.payload])
