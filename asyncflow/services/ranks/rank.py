"""A rank: it reads its own rows, works in one compute thread, and puts what came out.

The rank is where bytes become batches and batches bytes. A frame that is refused is set aside with its reason and
costs only its own rows, which leave as tombstones; a frame that is gone costs them nothing but time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from asyncflow.services.channels.endpoint import Frame, Payload, PayloadLost, Store
from asyncflow.services.channels.shard_refs import ShardRef, pack_apart
from asyncflow.services.ranks.quarantine import Quarantine
from asyncflow.services.ranks.rank_requests import carry_out
from asyncflow.services.ranks.row_consensus import exchange_unreadable_rows
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import LoadedWorker
from protocols.control.delivery import Damaged, RankCall, RankReply, Reading
from protocols.control.requests import LoadState, RankAnswer, RankRequest
from protocols.data import codec
from protocols.data.columns import Batch, concat, take
from protocols.data.messages import SCHEMAS, Metrics, Rollouts
from protocols.layout.row_plan import Segment
from protocols.stage import Failure, Measured, Partial


class Ranks(Protocol):
    """The ranks of a service, as its front sees them."""

    async def start(self) -> None:
        """Load every rank's model. Raises ServiceError naming the rank that could not."""
        ...

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        """One rank's part of a firing. An error of the method itself is raised."""
        ...

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """One rank's part of what is asked of all of them. An error of the worker is raised."""
        ...

    async def stop(self) -> None:
        """Free what they hold."""
        ...


class Rank:
    """One rank's inside."""

    def __init__(
        self, spec: ServiceSpec, workplace: LoadedWorker, store: Store, thread: ThreadPoolExecutor | None, rank: int = 0
    ) -> None:
        """`thread`: where `call` works; None where the process has nothing else to do and calls `work` itself."""
        self._spec, self._workplace, self._store, self._thread = spec, workplace, store, thread
        self._quarantine = Quarantine(spec.log_path, f"{spec.name}-{rank}")
        # One of several answers through its front, whatever the consumers are: what it puts must not travel inside.
        self._alone = spec.topology.world_size == 1
        self._direct = {stage.name: self._alone and stage.direct for stage in spec.stages}

    async def call(self, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        """Fetch, then `work` in the compute thread: see `Ranks.call`."""
        frames = [await self._fetch(payload) for payload in payloads]
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.work, call, frames)

    async def _fetch(self, payload: Payload) -> Frame | None:
        try:
            return await self._store.get(payload)
        except PayloadLost:
            return None

    def work(self, call: RankCall, frames: Sequence[Frame | None]) -> tuple[RankReply, list[Payload]]:
        """Read, compute, put. Blocking. `None` stands for a frame that is gone."""
        start = time.time()
        if delay := self._spec.delay_seconds.get(call.method, 0.0):
            time.sleep(delay)
        read = RowReader(call, frames)
        for number, reason in read.refused.items():
            if (frame := frames[number]) is not None:
                self._quarantine.keep(frame, f"{call.stage}: {reason}")
        if self._workplace.world is not None:
            exchange_unreadable_rows(call, read, self._workplace.world.exchange)
        result: Any = None
        if read.rows or self._spec.collective:
            self._workplace.reload()
            options = {} if call.sampling is None else {"sampling": call.sampling}
            result = self._workplace.method(call.method)(*read.inputs, **options)
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
            drawn=len(batch.responses.values) if isinstance(batch, Rollouts) else 0,
        )
        return reply, [part.payload for part in parts]

    async def ask(self, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """`answer` in the compute thread: see `Ranks.ask`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, request)

    def answer(self, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        """Do what the front asks besides rows. Blocking."""
        start = time.time()
        reply, payloads = carry_out(self._workplace, self._store, request)
        if isinstance(request, LoadState) and self._spec.leased:
            self._workplace.leave()  # all services restore at once, when none of them has the devices
        return RankAnswer(start, time.time(), reply), payloads

    def _put(self, stage: str, batch: Batch) -> list[ShardRef]:
        direct = self._direct.get(stage, self._alone)
        return pack_apart(
            self._store, batch, self._spec.term, direct=direct, object_bytes=self._spec.limits.object_bytes
        )


class OwnRank:
    """The single rank of a service, in the front's own process. Implements `Ranks`."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    async def start(self) -> None:
        """It is built."""

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        return await self._rank.call(call, payloads)

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        return await self._rank.ask(request)

    async def stop(self) -> None:
        """The front frees it."""


class RowReader:
    """The rows of one call: what could be read, and what could not. `inputs` hold the readable rows in call order."""

    def __init__(self, call: RankCall, frames: Sequence[Frame | None]) -> None:
        self.read_bytes: list[int] = []
        self.refused: dict[int, str] = {}  # frame -> why
        self.damaged: list[Damaged] = []
        self.lost: list[int] = []
        count = sum(map(len, call.readings[0].segments)) if call.readings else 0
        readable = np.ones(count, bool)
        ids = np.array(call.sample_ids, np.int64)
        read = [self._read(position, reading, ids, frames, readable) for position, reading in enumerate(call.readings)]
        self.rows = int(readable.sum())
        self.inputs: list[Batch] = []
        if self.rows:
            for batch, there in read:
                assert batch is not None
                rows = np.flatnonzero(readable[there])
                self.inputs.append(batch if len(rows) == len(batch) else take(batch, rows))

    def _read(
        self, input: int, reading: Reading, ids: np.ndarray, frames: Sequence[Frame | None], readable: np.ndarray
    ) -> tuple[Batch | None, np.ndarray]:
        """One input's rows that could be read, and their positions in the call; marks the others."""
        schemas = {reading.schema: SCHEMAS[reading.schema]}
        batches: list[Batch] = []
        there: list[np.ndarray] = []
        opened: dict[int, codec.Frame] = {}
        first = 0
        for source, segments in _runs(reading.segments):
            rows = np.concatenate([np.arange(s.start, s.stop) for s in segments])
            span = np.arange(first, first + len(rows))
            first += len(rows)
            frame = frames[source]
            if frame is None:
                self.lost += span[readable[span]].tolist()
                readable[span] = False
                continue
            try:
                if source not in opened:
                    opened[source] = codec.open_frame(frame, schemas=schemas)
                batch = opened[source].read(rows)
                if not np.array_equal(batch.sample_ids, ids[span]):
                    raise codec.BadFrame("it holds other rows than its shard names")
                batches.append(batch)
                there.append(span)
            except (codec.BadFrame, IndexError) as error:  # or it has fewer rows than its shard names
                self.refused[source] = str(error)
                cause = f"its frame was refused: {error}"
                self.damaged.append(Damaged(input, span[readable[span]].tolist(), cause))
                readable[span] = False
        self.read_bytes.append(sum(frame.bytes_read for frame in opened.values()))
        empty = np.empty(0, np.int64)
        return (concat(batches), np.concatenate(there)) if batches else (None, empty)


def unwrap(result: Any) -> tuple[Batch | None, list[Failure], Metrics | None]:
    """Batch, failures and metrics in whatever a stage's method returned."""
    match result:
        case Partial():
            return result.batch, result.failures, None
        case Measured():
            return result.batch, [], result.metrics
        case Metrics():
            return None, [], result
        case _:
            return result, [], None


def _runs(segments: list[Segment]) -> list[tuple[int, list[Segment]]]:
    """Neighbouring segments of one source together."""
    runs: list[tuple[int, list[Segment]]] = []
    for segment in segments:
        if runs and runs[-1][0] == segment.source:
            runs[-1][1].append(segment)
        else:
            runs.append((segment.source, [segment]))
    return runs
