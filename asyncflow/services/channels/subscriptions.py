"""Subscriptions let external readers follow what a stage sends. The dataflow never waits for them.

    StageContext.send ──offer──> one bounded queue per reader <──NextRows── the reader, which reads the bytes itself

A queue holds references to the newest deliveries. A reader that is too slow loses the oldest ones and learns how many
rows it missed; a reader that stops polling is dropped. `Subscriptions` is the service's end, `follow` the reader's.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from asyncflow.services.channels.endpoint import Payload, PayloadLost, Requestable, ServiceError, Store, ask
from asyncflow.services.channels.shard_refs import ShardRef, parts_of, unpack
from protocols.control.replies import Done, Reply, Rows, Subscribed
from protocols.control.requests import NextRows, Subscribe, Unsubscribe
from protocols.data import codec
from protocols.data.columns import Batch

B = TypeVar("B", bound=Batch)

MOST_DELIVERIES = 64  # in the queue of one reader
MOST_READERS = 64  # per service
FORGET_SECONDS = 60.0  # after which a reader that does not poll is dropped
LONGEST_POLL_SECONDS = 30.0
POLL_SECONDS = 1.0  # of `follow`: how long it may take to see that the run has ended


class _Reader:
    """One subscriber's queue."""

    def __init__(self, stage: str, now: float) -> None:
        self.stage = stage
        self.seen_at = now
        self.polls = 0  # requests that wait at the moment
        self.missed = 0  # rows, since its last reply
        self.queue: deque[list[ShardRef]] = deque()
        self.offered = asyncio.Event()

    def offer(self, parts: list[ShardRef]) -> None:
        if len(self.queue) == MOST_DELIVERIES:
            self.missed += sum(len(part.shard.sample_ids) for part in self.queue.popleft())
        self.queue.append(parts)
        self.offered.set()

    def take(self) -> tuple[list[ShardRef], int]:
        parts = [part for delivery in self.queue for part in delivery]
        missed, self.missed = self.missed, 0
        self.queue.clear()
        self.offered.clear()
        return parts, missed


class Subscriptions:
    """The external readers of one service. It holds at most `MOST_READERS` * `MOST_DELIVERIES` references."""

    def __init__(self, stages: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        """`stages`: the service's stages that send rows; `clock`: in seconds."""
        self._stages, self._clock = list(stages), clock
        self._readers: dict[int, _Reader] = {}

    def __len__(self) -> int:
        """The number of readers."""
        return len(self._readers)

    async def answer(self, request: Subscribe | NextRows | Unsubscribe) -> tuple[Reply, list[Payload]]:
        """Carry out a reader's request."""
        match request:
            case Subscribe():
                return Subscribed(self.open(request.stage)), []
            case NextRows():
                parts, missed = await self.next(request.number, request.seconds)
                return Rows([part.shard for part in parts], missed), [part.payload for part in parts]
            case Unsubscribe():
                self.close(request.number)
                return Done(), []

    def open(self, stage: str) -> int:
        """Start to queue what a stage sends; returns the subscription's number.

        Raises LookupError for a stage that sends nothing here, RuntimeError if there are too many readers.
        """
        if stage not in self._stages:
            raise LookupError(f"no stage {stage!r} sends rows here; there is {', '.join(self._stages) or 'none'}")
        self._forget()
        if len(self._readers) >= MOST_READERS:
            raise RuntimeError(f"{MOST_READERS} subscriptions are open, no more are taken; end one of them first")
        number = secrets.randbits(53)  # random: after a restart, an old reader must not meet another's queue
        self._readers[number] = _Reader(stage, self._clock())
        return number

    def close(self, number: int) -> None:
        """End a subscription. Idempotent."""
        self._readers.pop(number, None)

    def offer(self, stage: str, parts: Sequence[ShardRef]) -> None:
        """Queue a delivery for the readers of its stage. Never waits."""
        if not self._readers or not parts:
            return
        self._forget()
        for reader in self._readers.values():
            if reader.stage == stage:
                reader.offer(list(parts))

    async def next(self, number: int, seconds: float) -> tuple[list[ShardRef], int]:
        """A reader's queued shards, and how many rows it missed; empty if nothing arrives within `seconds`.

        Raises LookupError for an unknown subscription, or one that was dropped.
        """
        reader = self._readers.get(number)
        if reader is None:
            raise LookupError(
                f"no subscription {number}: it was ended, or it was not read for {FORGET_SECONDS:g} s, "
                "or the service was replaced; subscribe again"
            )
        reader.polls += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(seconds, LONGEST_POLL_SECONDS)):
                    await reader.offered.wait()
        finally:
            reader.polls -= 1
            reader.seen_at = self._clock()
        return reader.take()

    def _forget(self) -> None:
        """Drop the readers that stopped polling."""
        oldest = self._clock() - FORGET_SECONDS
        for number in [n for n, reader in self._readers.items() if not reader.polls and reader.seen_at < oldest]:
            del self._readers[number]


async def follow(
    endpoint: Requestable, store: Store, stage: str, kind: type[B], over: Callable[[], bool]
) -> AsyncGenerator[tuple[B | None, int]]:
    """Yield what a stage sends from now on until the run ends: each shard's rows, and how many were missed before them.

    Rows that can't be read (a bad frame, or a dead sender) count as missed. (None, n) means that n rows were missed
    and none follow yet. Leaving the iteration unsubscribes.

    Args:
        over: whether the run has ended; the rows sent until then are still read.

    Raises ServiceError if the service is gone while the run goes on.
    """
    reply, _ = await ask(endpoint, Subscribe(stage))
    assert isinstance(reply, Subscribed)
    try:
        while True:
            last = over()
            rows, payloads = await _next(endpoint, reply.number, 0.0 if last else POLL_SECONDS, over)
            missed = rows.missed
            for part in parts_of(rows.shards, payloads):
                batch = await _read(store, part, kind)
                if batch is None:
                    missed += len(part.shard.sample_ids)
                    continue
                yield batch, missed
                missed = 0
            if missed:
                yield None, missed
            if last and not rows.shards:
                return
    finally:
        with contextlib.suppress(ServiceError):  # a service that is gone has forgotten its readers
            await ask(endpoint, Unsubscribe(reply.number))


async def _next(
    endpoint: Requestable, number: int, seconds: float, over: Callable[[], bool]
) -> tuple[Rows, list[Payload]]:
    try:
        reply, payloads = await ask(endpoint, NextRows(number, seconds))
    except ServiceError:
        if over():  # the service ended with its run
            return Rows(), []
        raise
    assert isinstance(reply, Rows)
    return reply, payloads


async def _read(store: Store, part: ShardRef, kind: type[B]) -> B | None:
    try:
        return await asyncio.to_thread(unpack, [await store.get(part.payload)], kind)
    except (codec.BadFrame, PayloadLost):
        return None
