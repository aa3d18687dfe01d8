"""The stage policy.generate of a service with a generation loop: its prompts become jobs, finished rows are sent on.

GeneratingStage.run
    consumes      finished rows and failures of its jobs
    waits for     the first of them, which is reported as what the loop waits for; then credit at the consumers
    unblocked by  a job that gives rows; the consumers' mailboxes
    produces      rollouts and failures for the next stages

Finished rows leave through each stage's own sender, so a slow consumer never holds an engine slot; admission bounds
what waits there.
"""

from __future__ import annotations

import asyncio
from collections import deque

from asyncflow.services.channels.row_table import RowTable
from asyncflow.services.channels.shard_refs import ShardRef
from asyncflow.services.failpoints import reach
from asyncflow.services.generation import GenerationLoop, Job
from asyncflow.services.ranks.spec import StageSpec
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import StageRunner, read_or_fail
from protocols.control.delivery import Delivery
from protocols.data.columns import concat, take
from protocols.data.messages import Prompts, Rollouts
from protocols.stage import Failure


class GeneratingStage(StageRunner):
    """policy.generate: prompts in, finished rollouts out in the order in which they finish."""

    def __init__(self, context: StageContext, spec: StageSpec, loop: GenerationLoop) -> None:
        super().__init__(context, spec)
        self._loop = loop
        self._submitted: RowTable[int] = RowTable(
            1, context.finished
        )  # submitted prompts, so that none is generated twice
        self._out: deque[tuple[Rollouts | None, list[Failure], int]] = deque()  # bounded by the admission window
        self._finished = asyncio.Event()
        self._sends = False
        self._generation_waits = "rows"
        loop.on_wait(self._note_wait)

    async def accept(self, position: int, delivery: Delivery, parts: list[ShardRef]) -> int:
        if self.spec.schemas[position] != Prompts.schema_id:
            raise ValueError(f"{self.spec.name}: takes prompts, its edge carries schema {self.spec.schemas[position]}")
        refused = 0
        for part in parts:
            batch, failures = await read_or_fail(self.context, part, Prompts, delivery.edge)
            if failures:
                self._give(None, failures, delivery.attempt)
            if batch is None:
                continue
            assert isinstance(batch, Prompts)
            arrival = self._submitted.arrive(0, [(s, i) for i, s in enumerate(part.shard.sample_ids)], delivery.attempt)
            refused += len(arrival.refused)
            fresh = self._submitted.take(arrival.complete).inputs[0]
            if fresh:
                self._submit(batch if len(fresh) == len(batch) else take(batch, fresh), delivery.attempt)
        return refused

    def _submit(self, prompts: Prompts, attempt: int) -> None:
        assert self.spec.sampling is not None

        def give(rollouts: Rollouts | None, failures: list[Failure]) -> None:
            self._give(rollouts, failures, attempt)

        self._loop.submit(Job(prompts, self.spec.sampling, give, whole=self.context.spec.deterministic))

    def _give(self, rollouts: Rollouts | None, failures: list[Failure], attempt: int) -> None:
        self._out.append((rollouts, failures, attempt))
        self._finished.set()

    async def turn(self) -> None:
        """Send all rows that finished while the last send waited."""
        await self._finished.wait()
        self._finished.clear()
        self._sends = True  # what it waits for now is credit; meanwhile the engine goes on
        try:
            await self._send_finished()
        finally:
            self._sends = False
        self._note_wait(self._generation_waits)

    def _note_wait(self, what: str) -> None:
        self._generation_waits = what
        if not self._sends:
            on = {"rows": ", ".join(self.spec.sources), "weights": "policy", "lease": self.context.spec.pool}
            self.waits(what, on.get(what, ""))

    async def _send_finished(self) -> None:
        gathered = list(self._out)
        self._out.clear()
        for attempt in dict.fromkeys(a for _, _, a in gathered):
            rows = [r for r, _, a in gathered if r is not None and a == attempt]
            failures = [f for _, fs, a in gathered for f in fs if a == attempt]
            parts = await self.context.pack(concat(rows), attempt, direct=self.spec.direct) if rows else []
            reach(self.context.spec.name, "generated")
            await self.context.send(self.spec, parts, failures, attempt=attempt)

    def depth(self) -> tuple[int, int, int]:
        return self._loop.waiting + len(self._out), 0, 0

    async def end(self, prompts: list[int]) -> None:
        self._submitted.end(prompts)
