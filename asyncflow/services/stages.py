"""The stages of a service. Each owns its mailbox and runs one loop, which fires when rows are ready.

    RowStage       consumes rows of every input (log_probs, values, score), as many as have arrived
                   waits for a full row, then the lease, then room at every consumer
                   unblocked by a delivery; the controller's Grant; a consumer that took its rows in
                   produces rows, and tombstones for rows that failed
    ClosingStage   consumes rows of every input; they are joined as they arrive, and its loop only sleeps
                   waits for nothing: the controller calls `close`; if it replaces a process that died, for its rows
                   unblocked by CloseBatch, which names the batch's samples, and redeliveries
                   produces PromptSettled notices, and a closed batch of experience
    TrainingStage  consumes one closed batch
                   waits for the batch, then the lease
                   unblocked by the closing stage's delivery; the controller's Grant
                   produces StepDone

A generating stage feeds an engine (generation.py) or the training ranks (colocated_generation.py). A stage that waits
holds no lease, no compute thread and no rows.
"""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from asyncflow.services.batch_metrics import batch_metrics
from asyncflow.services.channels.endpoint import PayloadLost
from asyncflow.services.channels.mailbox import Mailbox
from asyncflow.services.channels.prompt_join import PromptJoin
from asyncflow.services.channels.shard_refs import RowRef, ShardRef, arrivals, row_refs
from asyncflow.services.failpoints import reach
from asyncflow.services.firing import Fired
from asyncflow.services.ranks.rank import unwrap
from asyncflow.services.ranks.spec import StageSpec
from asyncflow.services.shown_samples import SampleShow
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import Delivery
from protocols.control.notices import StepDone
from protocols.control.replies import BatchClosed
from protocols.control.requests import CloseBatch
from protocols.control.samples import ShownSample
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.data.messages import SCHEMAS
from protocols.stage import Failure


class StageRunner(ABC):
    """One call site of the dataflow: its mailbox and its loop."""

    def __init__(self, context: StageContext, spec: StageSpec) -> None:
        self.context = context
        self.spec = spec

    async def deliver(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> None:
        """Take a delivery in, and count it. Returns when there was room for it."""
        start = time.time()
        refused = await self.accept(position, delivery, parts)
        inline = sum(self.context.store.inline_bytes(part.payload) for part in parts)
        rows = delivery.rows + len(delivery.failures)
        self.context.counts.arrived(delivery.edge, rows, refused, inline, time.time() - start)

    @abstractmethod
    async def accept(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> int:
        """Take rows of one input in. Returns how many were refused: duplicates, and rows that come too late."""

    async def run(self) -> None:
        """Fire until cancelled."""
        while True:
            await self.turn()  # its locals end with it: while a stage waits, its last rows' memory is free

    @abstractmethod
    async def turn(self) -> None:
        """Wait until there is something to do, and do it."""

    @abstractmethod
    def depth(self) -> tuple[int, int, int]:
        """Rows waiting, capacity (0 where it is bounded at the source), and most rows that ever waited."""

    async def end(self, prompts: list[int]) -> None:  # noqa: B027 - a batch that trains remembers none
        """These prompts are finished: forget their rows."""

    def waits(self, what: str, on: str) -> None:
        """Report what this stage waits for from now on; an empty `what`: it works."""
        self.context.reports.wait(self.spec.name, what, on)


class RowStage(StageRunner):
    """log_probs, values, score: rows in, rows out, tombstones passed on. Its coordinator reads no row."""

    def __init__(self, context: StageContext, spec: StageSpec) -> None:
        super().__init__(context, spec)
        # "The whole batch" needs no minimum: deterministic generation delivers whole waves.
        self._most = sys.maxsize if context.spec.deterministic else context.spec.limits.firing_rows
        self._mailbox: Mailbox[RowRef] = Mailbox(
            len(spec.inputs),
            context.spec.limits.mailbox_rows,
            in_id_order=context.spec.deterministic,
            finished=context.finished,
        )

    async def accept(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> int:
        rows = arrivals(parts, delivery.failures)
        return len((await self._mailbox.put(position, rows, delivery.attempt)).refused)

    async def turn(self) -> None:
        self.waits("rows", ", ".join(self.spec.sources))
        joined = await self._mailbox.take(self._most)
        fired = Fired()
        reach(self.context.spec.name, "taken")
        if joined.samples:
            self.waits("lease", self.context.spec.pool)
            fired = await self.fire(joined.samples, joined.inputs)
        reach(self.context.spec.name, "computed")
        again, gone = self.context.ask_again(self.spec.name, fired.lost)
        if again:
            await self._mailbox.take_back(again)
        failures = joined.failures + fired.failures + gone
        await self.context.send(self.spec, fired.parts, failures, attempt=joined.attempt)

    async def fire(self, samples: Sequence[int], inputs: Sequence[Sequence[RowRef]]) -> Fired:
        """Take the lease, and let the ranks work on rows that were joined."""
        async with self.context.lease(self.spec.name):
            self.waits("", "")
            return await self.context.fire(self.spec, samples, inputs)

    def depth(self) -> tuple[int, int, int]:
        return self._mailbox.depth, self._mailbox.capacity, self._mailbox.peak

    async def end(self, prompts: list[int]) -> None:
        await self._mailbox.end(prompts)


class ClosingStage(StageRunner):
    """Joins the rows of a step and makes experience of a closed batch. Its single rank reads rows as they arrive."""

    def __init__(
        self,
        context: StageContext,
        spec: StageSpec,
        function: Callable[..., Any],
        filter: Callable[..., Any] | None = None,
        *,
        partial: bool = False,
        show: SampleShow | None = None,
    ) -> None:
        """`filter` gets a prompt's rows of the spec's `filter_inputs` and says which are trainable; None: all.

        `partial`: a prompt is trained without the samples that failed, where enough are left. `show`: writes some of
        a batch's samples as text.
        """
        super().__init__(context, spec)
        self._function = function
        self._filter = filter
        self._show = show
        self._join = PromptJoin(
            spec.grains,
            context.spec.samples_per_prompt,
            context.finished,
            None if filter is None else self._is_trainable,
            partial=partial,
        )
        self._arrived = asyncio.Event()  # set by each arrival of rows

    def _is_trainable(self, rows: Mapping[int, Batch]) -> bool:
        assert self._filter is not None
        seen = [rows[position] for position in self.spec.filter_inputs]
        try:
            return bool(np.any(self._filter(*seen)))
        except Exception as error:  # otherwise the stage whose rows came last would be blamed
            prompt = prompt_of(int(seen[0].sample_ids[0]))
            raised = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.spec.name}: {self.spec.filter} of prompt {prompt} raised {raised}") from error

    async def accept(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> int:
        """Read each shard by itself, so that a damaged one costs only its own rows, as tombstones."""
        arrived = [self._join.arrive(position, None, delivery.failures, delivery.attempt)]
        for part in parts:
            batch, failures = await read_or_fail(
                self.context, part, SCHEMAS[self.spec.schemas[position]], delivery.edge
            )
            arrived.append(self._join.arrive(position, batch, failures, delivery.attempt))
        for notices, _ in arrived:
            for notice in notices:
                self.context.reports.notify(notice)
        self._arrived.set()
        return sum(len(arrival.refused) for _, arrival in arrived)

    async def turn(self) -> None:
        """Sleep: the controller decides when a batch is closed (`close`)."""
        await asyncio.Event().wait()

    async def close(self, request: CloseBatch) -> BatchClosed:
        """Fire on a closed batch and send its experience to the trainers."""
        await self._wait_for(request.sample_ids)
        inputs = self._join.take(request.sample_ids)
        result = await self.context.compute(
            self.spec.name,
            lambda: self._function(*inputs),
            rows=len(request.sample_ids),
            step=request.step,
        )
        batch, _, metrics = unwrap(result)
        assert batch is not None
        reach(self.context.spec.name, "closing")
        await self.context.send(
            self.spec, await self.context.pack(batch, direct=self.spec.direct), [], step=request.step
        )
        values = (metrics.values if metrics is not None else {}) | batch_metrics(inputs)
        return BatchClosed(values, await self._shown(request.step, inputs, batch))

    async def _shown(self, step: int, inputs: Sequence[Batch], batch: Batch) -> list[ShownSample]:
        """A few of the batch's samples as text, after it was sent: nobody waits for them. `step`: from 0."""
        show = self._show
        if show is None or not show.due(step + 1):
            return []
        return await self.context.compute("show samples", lambda: show.of(inputs, batch), step=step)

    async def _wait_for(self, samples: list[int]) -> None:
        """Wait for rows that the controller knows from the process before this one, and that are on their way again."""
        while not self._join.holds(samples):
            self._arrived.clear()
            self.waits("rows again", ", ".join(self.spec.sources))
            await self._arrived.wait()
        self.waits("", "")

    def depth(self) -> tuple[int, int, int]:
        return self._join.depth, 0, self._join.peak

    async def end(self, prompts: list[int]) -> None:
        self._join.end(prompts)


class TrainingStage(StageRunner):
    """update: trains on one closed batch after the other."""

    def __init__(self, context: StageContext, spec: StageSpec) -> None:
        super().__init__(context, spec)
        # The controller closes batch k + 1 after k is committed: one place is enough, and a second would hide a fault.
        self._batches: asyncio.Queue[tuple[int, list[ShardRef]]] = asyncio.Queue(1)
        self._newest = -1

    async def accept(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> int:
        if not parts or delivery.failures:
            raise ValueError(f"{self.spec.name}: a closed batch has rows and no tombstones")
        if delivery.step <= self._newest:
            return delivery.rows
        self._newest = delivery.step
        await self._batches.put((delivery.step, parts))
        return 0

    async def turn(self) -> None:
        self.waits("batch", ", ".join(self.spec.sources))
        step, parts = await self._batches.get()
        rows = row_refs(parts)
        reach(self.context.spec.name, "training")
        self.waits("lease", self.context.spec.pool)
        async with self.context.lease(self.spec.name):
            self.waits("", "")
            fired = await self.context.fire(
                self.spec, [sample for sample, _ in rows], [[place for _, place in rows]], step=step
            )
        if fired.failures or fired.lost:
            causes = {failure.cause for failure in fired.failures} or {"their sender is gone"}
            raise ValueError(f"step {step} has rows that can't be read: {'; '.join(sorted(causes))}")
        reach(self.context.spec.name, "trained")
        measured = fired.metrics.values if fired.metrics else {}
        self.context.reports.notify(StepDone(self.spec.name, step, self.context.reports.take_measured() | measured))

    def depth(self) -> tuple[int, int, int]:
        return self._batches.qsize(), 1, 1


async def read_or_fail(
    context: StageContext, part: ShardRef, kind: type[Batch], edge: str
) -> tuple[Batch | None, list[Failure]]:
    """A shard's rows, or a tombstone for each where its frame is refused, or gone time and again; else neither."""
    try:
        return await context.read([part], kind, edge), []
    except codec.BadFrame as error:
        context.counts.damaged(edge, len(part.shard.sample_ids))
        return None, tombstones(part.shard.sample_ids, f"its frame was refused: {error.reason}")
    except PayloadLost:
        _, failures = context.ask_again(edge.rpartition(".")[0], part.shard.sample_ids)
        return None, failures


def tombstones(samples: Sequence[int], cause: str) -> list[Failure]:
    """One a sample."""
    return [Failure(sample, cause) for sample in samples]
