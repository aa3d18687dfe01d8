"""Rank: it reads its rows, calls its worker in one compute thread, and stores the output.

Frames are decoded to batches and batches encoded to frames here. A damaged frame is quarantined with the reason, and
only its own rows fail. If the owner of a frame died, the rows are sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from asyncflow.services.channels.endpoint import Frame, Payload, PayloadLost, Store
from asyncflow.services.channels.shard_refs import ShardRef, pack_apart
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.quarantine import Quarantine
from asyncflow.services.ranks.rank_requests import carry_out
from asyncflow.services.ranks.row_consensus import exchange_unreadable_rows
from asyncflow.services.ranks.row_reader import RowReader
from asyncflow.services.ranks.spec import ServiceSpec
from protocols.control.delivery import RankCall, RankReply
from protocols.control.requests import LoadState, RankAnswer, RankRequest
from protocols.data.columns import Batch
from protocols.data.messages import Metrics, Rollouts
from protocols.stage import Failure, Measured, Partial


class Ranks(Protocol):
    """The ranks of a service, as its coordinator sees them."""

    async def start(self) -> None:
        """Load every rank's model. Raises ServiceError naming the rank that failed."""
        ...

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        """Run one rank's part of a firing. Raises what the worker's method raises."""
        ...

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """Run one rank's part of a request to all ranks. Raises what the worker raises."""
        ...

    async def stop(self) -> None:
        """Free the models."""
        ...


class Rank:
    """One rank: its worker, its store and its quarantine."""

    def __init__(
        self, spec: ServiceSpec, loaded: LoadedWorker, store: Store, thread: ThreadPoolExecutor | None, rank: int = 0
    ) -> None:
        """`thread`: the thread of `call` and `ask`; None if the process calls `work` and `answer` itself."""
        self._spec, self._loaded, self._store, self._thread = spec, loaded, store, thread
        self._quarantine = Quarantine(spec.log_path, f"{spec.name}-{rank}")
        # The output of one of several ranks passes the coordinator by reference, so it must not travel inline.
        self._alone = spec.topology.world_size == 1
        self._direct = {stage.name: self._alone and stage.direct for stage in spec.stages}

    async def call(self, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        """Fetch the frames, then `work` in the compute thread. See `Ranks.call`."""
        frames = [await self._fetch(payload) for payload in payloads]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.work, call, frames)

    async def _fetch(self, payload: Payload) -> Frame | None:
        try:
            return await self._store.get(payload)
        except PayloadLost:
            return None

    def work(self, call: RankCall, frames: Sequence[Frame | None]) -> tuple[RankReply, list[Payload]]:
        """Read the rows, compute, and store the output. Blocking. `None` stands for a lost frame."""
        start = time.time()
        if delay := self._spec.delay_seconds.get(call.method, 0.0):
            time.sleep(delay)
        read = RowReader(call, frames)
        for number, reason in read.refused.items():
            if (frame := frames[number]) is not None:
                self._quarantine.keep(frame, f"{call.stage}: {reason}")
        if self._loaded.world is not None:
            exchange_unreadable_rows(call, read, self._loaded.world.exchange)
        result: Any = None
        if read.rows or self._spec.collective:
            self._loaded.reload()
            options = {} if call.sampling is None else {"sampling": call.sampling}
            result = self._loaded.method(call.method)(*read.inputs, **options)
        batch, failures, metrics = unwrap(result)
        parts = self._put(call.stage, batch) if batch is not None and len(batch) else []
        reply = RankReply(
            start=start,
            end=time.time(),
            read_bytes=read.read_bytes,
            shards=[part.shard for part in parts],
            failures=failures,
            metrics=metrics,
            damaged=read.damaged,
            lost=read.lost,
            generated_tokens=len(batch.responses.values) if isinstance(batch, Rollouts) else 0,
        )
        return reply, [part.payload for part in parts]

    async def ask(self, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """Run `answer` in the compute thread. See `Ranks.ask`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, request)

    def answer(self, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """Carry out a coordinator's request, which has no rows. Blocking."""
        start = time.time()
        reply, payloads = carry_out(self._loaded, self._store, request)
        if isinstance(request, LoadState) and self._spec.leased:
            self._loaded.offload()  # all services restore at once, without a lease
        return RankAnswer(start, time.time(), reply), payloads

    def _put(self, stage: str, batch: Batch) -> list[ShardRef]:
        direct = self._direct.get(stage, self._alone)
        return pack_apart(
            self._store, batch, self._spec.term, direct=direct, object_bytes=self._spec.limits.object_bytes
        )


class OwnRank:
    """The single rank of a service, in the coordinator's own process. Implements `Ranks`."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    async def start(self) -> None:
        """Do nothing: the rank is built already."""

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        return await self._rank.call(call, payloads)

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        return await self._rank.ask(request)

    async def stop(self) -> None:
        """Do nothing: the coordinator frees the worker."""


def unwrap(result: Any) -> tuple[Batch | None, list[Failure], Metrics | None]:
    """The batch, failures and metrics of a stage method's result, whatever its type."""
    match result:
        case Partial():
            return result.batch, result.failures, None
        case Measured():
            return result.batch, [], result.metrics
        case Metrics():
            return None, [], result
        case _:
            return result, [], None
