"""Rank: it reads its rows, calls its worker in one compute thread, and stores the output.

Frames are decoded to batches and batches encoded to frames here. A damaged frame is quarantined with the reason, and
only its own rows fail. If the owner of a frame died, the rows are sent again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import msgspec

from asyncflow.observe.memory import memory_here
from asyncflow.services.channels.endpoint import Frame, Payload, Store, get_or_none
from asyncflow.services.channels.shard_refs import ShardRef, pack_apart
from asyncflow.services.failpoints import MOMENTS, reach
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.quarantine import Quarantine
from asyncflow.services.ranks.rank_requests import abandon, activity_of, carry_out
from asyncflow.services.ranks.row_consensus import exchange_unreadable_rows
from asyncflow.services.ranks.row_reader import RowReader
from asyncflow.services.ranks.shared_process import computing
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from protocols.control.delivery import RankCall, RankReply
from protocols.control.replies import Done, RankAnswer
from protocols.control.requests import AbandonStep, BeginTerm, LoadState, Ping, RankRequest
from protocols.data.columns import Batch
from protocols.data.messages import Metrics, Rollouts
from protocols.stage import Failure, Measured, Partial, StepAbandoned

T = TypeVar("T")


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
    """One rank: its worker, its store, its quarantine and its thread."""

    def __init__(
        self, spec: ServiceSpec, loaded: LoadedWorker, store: Store, thread: ThreadPoolExecutor | None, rank: int = 0
    ) -> None:
        """`thread`: the thread of `call` and `ask`; None if the process calls `work` and `answer` itself."""
        self._spec, self._loaded, self._store, self._thread = spec, loaded, store, thread
        self._abandoned = threading.Event()
        self._quarantine = Quarantine(spec.log_path, f"{spec.name}-{rank}")
        # The output of one of several ranks passes the coordinator by reference, so it must not travel inline.
        self._alone = spec.topology.world_size == 1
        self._process = spec.name if self._alone else f"{spec.name}-{rank}"
        self._direct = {stage.name: self._alone and stage.direct for stage in spec.stages}

    async def call(
        self, call: RankCall, payloads: list[Payload], output: Store | None = None
    ) -> tuple[RankReply, list[Payload]]:
        """Fetch the frames, then `work` in the compute thread. See `Ranks.call`."""
        frames = [await get_or_none(self._store, payload) for payload in payloads]
        return await self._in_thread(lambda: self.work(call, frames, output))

    async def ask(self, request: RankRequest, output: Store | None = None) -> tuple[RankAnswer, list[Payload]]:
        """Run `answer` in the compute thread. See `Ranks.ask`."""
        if isinstance(request, Ping):
            return RankAnswer(time.time(), time.time(), Done(memory_here())), []
        if isinstance(request, AbandonStep):
            return self._abandon(request), []
        return await self._in_thread(lambda: self.answer(request, output))

    async def close(self) -> None:
        """Free the worker, after its current call."""
        await self._in_thread(self._loaded.close)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        def alone() -> T:
            with computing():
                return function()

        return await asyncio.get_running_loop().run_in_executor(self._thread, alone)

    def work(
        self, call: RankCall, frames: Sequence[Frame | None], output: Store | None = None
    ) -> tuple[RankReply, list[Payload]]:
        """Read the rows, compute, and store what came out. Blocking.

        Args:
            frames: of the call's payloads; None stands for a lost frame.
            output: the store of the reply's frames, if it is not the rank's own.
        """
        start = time.time()
        if delay := self._spec.delay_seconds.get(call.method, 0.0):
            self._abandoned.wait(delay)
        read = RowReader(call, frames)
        for number, reason in read.refused.items():
            if (frame := frames[number]) is not None:
                self._quarantine.keep(frame, f"{call.stage}: {reason}")
        if self._loaded.world is not None:
            exchange_unreadable_rows(call, read, self._loaded.world.exchange)
        result: Any = None
        reach(self._process, "taken" if call.step < 0 else "training")
        if read.rows or self._spec.collective:
            self._loaded.onload()
            options = {} if call.sampling is None else {"sampling": call.sampling}
            try:
                result = self._loaded.method(call.method)(*read.inputs, **options)
            except StepAbandoned:
                result = Metrics(values={})
        reach(self._process, "computed" if call.step < 0 else "trained")
        batch, failures, metrics = unwrap(result)
        parts = self._put(output or self._store, call.stage, batch) if batch is not None and len(batch) else []
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

    def answer(self, request: RankRequest, output: Store | None = None) -> tuple[RankAnswer, list[Payload]]:
        """Carry out a coordinator's request, which has no rows. Blocking."""
        start = time.time()
        if (moment := activity_of(request)) in MOMENTS:
            reach(self._process, moment)
        if isinstance(request, BeginTerm):  # its rows name their term; the worker knows none
            self._spec = msgspec.structs.replace(self._spec, term=request.term)
            reply, payloads = Done(), list[Payload]()
        else:
            reply, payloads = carry_out(self._loaded, output or self._store, request)
        if isinstance(request, LoadState | BeginTerm) and self._spec.leased:
            self._loaded.offload()  # all services restore at once, without a lease; in a new term nobody has one
        return RankAnswer(start, time.time(), reply), payloads

    def _abandon(self, request: AbandonStep) -> RankAnswer:
        """Beside the compute thread, which is busy with what this ends."""
        self._abandoned.set()
        abandon(self._loaded.worker, request)
        now = time.time()
        return RankAnswer(now, now, Done())

    def _put(self, store: Store, stage: str, batch: Batch) -> list[ShardRef]:
        direct = self._direct.get(stage, self._alone)
        return pack_apart(store, batch, self._spec.term, direct=direct, object_bytes=self._spec.limits.object_bytes)


class LocalRanks:
    """The independent ranks of one service in this process, each in a thread. Implements `Ranks`."""

    def __init__(self, spec: ServiceSpec, store: Store, own: Rank | None = None) -> None:
        """`own`: the single rank of a service, if it was built already."""
        self._spec, self._store = spec, store
        self._ranks = [own] if own is not None else []
        self._threads: list[ThreadPoolExecutor] = []

    async def start(self) -> None:
        if self._ranks:
            return
        if self._spec.collective:
            raise ValueError(
                f"collective ranks ({self._spec.topology}) need a process each: set runtime = 'ray' in the recipe"
            )
        for number in range(self._spec.topology.world_size):
            thread = ThreadPoolExecutor(1, thread_name_prefix=f"{self._spec.name}-{number}")
            self._threads.append(thread)
            loaded = await asyncio.get_running_loop().run_in_executor(thread, build, self._spec, number)
            self._ranks.append(Rank(self._spec, loaded, self._store, thread, number))

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        return await self._ranks[rank].call(call, payloads)

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        return await self._ranks[rank].ask(request)

    async def stop(self) -> None:
        for rank in self._ranks:
            await rank.close()
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)


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
