"""The stages of a service: each owns its mailbox and fires when its rows are ready.

Four kinds. A row stage fires on whatever rows are there. A closing stage joins rows, reports settled prompts
to the controller and fires when told which of them are the batch. A training stage fires on a closed batch.
A generating stage (generation.py) feeds an engine. All of them wait without holding anything.
"""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from asyncflow.services.host import Host
from asyncflow.services.mailbox import Mailbox
from asyncflow.services.prompt_join import PromptJoin
from asyncflow.services.spec import StageSpec
from protocols.columns import Batch, take
from protocols.control import CloseBatch, Done, StepDone, Waiting
from protocols.messages import Metrics
from protocols.stage import Failure, Measured, Partial
from protocols.topology import Topology
from protocols.transfer import protocol


class StageRunner(ABC):
    """One call site at work."""

    def __init__(self, host: Host, spec: StageSpec) -> None:
        self.host = host
        self.spec = spec

    @abstractmethod
    async def accept(self, position: int, batch: Batch | None, failures: list[Failure], step: int) -> None:
        """Take a delivery; returns when there was room for it."""

    @abstractmethod
    async def run(self) -> None:
        """Fire for ever."""

    @abstractmethod
    def depth(self) -> tuple[int, int]:
        """Rows waiting and capacity, 0 where it is bounded at the source."""

    def waits(self, what: str, on: str) -> None:
        """Report that this stage waits from now on."""
        self.host.notify(Waiting(self.spec.name, what, on, time.time()))


class RowStage(StageRunner):
    """log_probs, values, score: rows in, rows out, tombstones passed on."""

    def __init__(self, host: Host, spec: StageSpec, method: Callable[..., Any]) -> None:
        super().__init__(host, spec)
        self._method = method
        # "The whole batch" needs no minimum: deterministic generation delivers whole waves.
        self._most = sys.maxsize if host.spec.deterministic else host.spec.firing_rows
        self._mailbox = Mailbox(len(spec.inputs), host.spec.mailbox_rows, in_id_order=host.spec.deterministic)

    async def accept(self, position: int, batch: Batch | None, failures: list[Failure], step: int) -> None:
        await self._mailbox.put(position, batch, failures)

    async def run(self) -> None:
        while True:
            self.waits("rows", ", ".join(self.spec.sources))
            firing = await self._mailbox.take(self._most)
            batch, failures = None, firing.failures
            if firing.inputs:
                self.waits("lease", self.host.spec.pool)
                async with self.host.lease(self.spec.name):
                    self.waits("", "")
                    result = await self.host.compute(
                        self.spec.name, run_on_ranks, self.spec.protocol, self._method, firing.inputs, rows=len(firing)
                    )
                batch, new_failures = unwrap(result)
                check_complete(self.spec.name, firing.inputs[0], batch, new_failures)
                failures = failures + new_failures
            await self.host.send(self.spec, batch, failures)

    def depth(self) -> tuple[int, int]:
        return self._mailbox.depth, self._mailbox.capacity


class ClosingStage(StageRunner):
    """The join whose closed batch becomes experience."""

    def __init__(self, host: Host, spec: StageSpec, function: Callable[..., Any]) -> None:
        super().__init__(host, spec)
        self._function = function
        self._join = PromptJoin(len(spec.inputs), host.spec.samples_per_prompt)

    async def accept(self, position: int, batch: Batch | None, failures: list[Failure], step: int) -> None:
        for settled in self._join.arrive(position, batch, failures):
            self.host.notify(settled)

    async def run(self) -> None:
        """Nothing fires here by itself: the one batcher decides (`close`)."""

    async def close(self, request: CloseBatch) -> Done:
        """Fire on a closed batch and send its experience to the trainers."""
        inputs = self._join.take(request.sample_ids)
        result = await self.host.compute(
            self.spec.name,
            lambda: self._function(*inputs, **self.host.spec.numbers),
            rows=len(request.sample_ids),
            step=request.step,
        )
        metrics = result.metrics.values if isinstance(result, Measured) else {}
        batch, _ = unwrap(result)
        await self.host.send(self.spec, batch, [], request.step)
        return Done(metrics)

    def depth(self) -> tuple[int, int]:
        return self._join.depth, 0


class TrainingStage(StageRunner):
    """update: one closed batch after the other."""

    def __init__(self, host: Host, spec: StageSpec, method: Callable[[Batch], Metrics]) -> None:
        super().__init__(host, spec)
        self._method = method
        # The controller forms batch k + 1 when k is committed, so one place is enough; a second would hide a fault.
        self._batches: asyncio.Queue[tuple[int, Batch]] = asyncio.Queue(1)

    async def accept(self, position: int, batch: Batch | None, failures: list[Failure], step: int) -> None:
        if batch is None or failures:
            raise ValueError(f"{self.spec.name}: a closed batch has rows and no tombstones")
        await self._batches.put((step, batch))

    async def run(self) -> None:
        while True:
            self.waits("batch", ", ".join(self.spec.sources))
            step, batch = await self._batches.get()
            self.waits("lease", self.host.spec.pool)
            async with self.host.lease(self.spec.name):
                self.waits("", "")
                metrics = await self.host.compute(self.spec.name, self._method, batch, rows=len(batch), step=step)
            self.host.notify(StepDone(self.spec.name, step, metrics.values))

    def depth(self) -> tuple[int, int]:
        return self._batches.qsize(), 1


_ONE_RANK = Topology(1, 1, 1)


def run_on_ranks(name: str, method: Callable[..., Any], inputs: tuple[Batch, ...]) -> Any:
    """Cut the inputs by the stage's protocol, run the ranks, collect. This build of a service has one rank.

    3D_ALL_MICRO_DP needs a generation grouping and is the engine's; the other protocols give rank 0 all rows.
    """
    (rows,) = protocol(name).distribute(rows=len(inputs[0]), topology=_ONE_RANK)
    return method(*(take(batch, rows) for batch in inputs))


def check_complete(name: str, taken: Batch, given: Batch, failures: list[Failure]) -> None:
    """Each row leaves exactly once, as a value or as a tombstone: one that vanished would be waited for at the join.

    Raises ValueError naming the stage and the first samples.
    """
    out = [*given.sample_ids.tolist(), *(f.sample_id for f in failures)]
    if sorted(out) != sorted(taken.sample_ids.tolist()):
        wrong = sorted(set(out) ^ set(taken.sample_ids.tolist())) or sorted(s for s in set(out) if out.count(s) > 1)
        raise ValueError(f"{name}: took {len(taken)} rows and gave {len(out)}; not once each: samples {wrong[:4]}")


def unwrap(result: Any) -> tuple[Batch, list[Failure]]:
    """The batch and the failures in whatever a stage returned."""
    match result:
        case Partial():
            return result.batch, result.failures
        case Measured():
            return result.batch, []
        case _:
            return result, []
