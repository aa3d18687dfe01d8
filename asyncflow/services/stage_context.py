"""What a service's stages share: its ranks, the pool's lease, the way out, and the report to the controller.

Waiting for credit suspends only the sending stage: no lease, no compute thread and no engine slot is held
while `send` waits. The lease is asked for with all inputs in hand and returned before anything is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.channel_counts import ChannelCounts
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceGone, Store
from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.lost_rows import LostRows
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.shard_refs import (
    Partitioning,
    Place,
    RankCallPlan,
    ShardRef,
    pack_apart,
    parts_of,
    plan_calls,
    unpack,
)
from asyncflow.services.channels.subscriptions import Subscriptions
from asyncflow.services.ranks.collective_calls import CollectiveCalls
from asyncflow.services.ranks.quarantine import Quarantine
from asyncflow.services.ranks.rank import Ranks
from asyncflow.services.ranks.rank_requests import activity_of
from asyncflow.services.ranks.spec import ServiceSpec, StageSpec
from asyncflow.services.reports import Reports
from protocols.control.delivery import Delivery, RankReply
from protocols.control.notices import LeaseAsked, LeaseReturned, RowsLost
from protocols.control.requests import RankRequest, Reply
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.data.messages import Metrics
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol
from protocols.roles import Sampling
from protocols.stage import Failure

T = TypeVar("T")
B = TypeVar("B", bound=Batch)

INLINE_READING = 1 << 20  # bytes; checking more than this would hold up the event loop


class Fired(msgspec.Struct):
    """What came of one firing."""

    parts: list[ShardRef] = []  # outputs of the ranks that count, in the protocol's order
    failures: list[Failure] = []
    metrics: Metrics | None = None
    lost: list[int] = []  # samples whose bytes were gone
    drawn: int = 0  # response tokens, where it generated


class OutboxEntry(msgspec.Struct, frozen=True):
    """A delivery in the outbox."""

    service: str
    delivery: Delivery
    parts: list[ShardRef]

    @property
    def samples(self) -> list[int]:
        """All that it names, alive or dead."""
        alive = [sample for shard in self.delivery.shards for sample in shard.sample_ids]
        return alive + [failure.sample_id for failure in self.delivery.failures]


class StageContext:
    """The inside of a service, as its stages see it."""

    def __init__(self, spec: ServiceSpec, store: Store, exporter: Exporter) -> None:
        self.spec = spec
        self.store = store
        self.exporter = exporter
        self.counts = ChannelCounts(exporter)
        self.ended = FinishedPrompts()
        self.outbox: Outbox[OutboxEntry] = Outbox(self.ended)
        self.losses = LostRows()
        self.subscriptions = Subscriptions([stage.name for stage in spec.stages if stage.outputs])
        self.peers: Mapping[str, Endpoint] = {}
        self.ranks: Ranks | None = None
        self.topology = spec.topology
        self.generation = spec.grouping
        self.collective = CollectiveCalls(spec.name, spec.collective)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"{spec.name}-compute")
        self.reports = Reports(spec.name, exporter)
        self._quarantine = Quarantine(spec.log_path, spec.name)
        self._tickets = itertools.count()
        self._grants: dict[int, asyncio.Future[None]] = {}

    # --- working

    async def compute(
        self, activity: str, function: Callable[..., T], *arguments: Any, rows: int = 0, step: int = -1
    ) -> T:
        """Run blocking work in the service's own compute thread and account for its time."""
        delay = self.spec.delay_seconds.get(activity.split("#", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1], 0.0)
        if delay:
            await asyncio.sleep(delay)

        def timed() -> tuple[T, float, float]:  # in the thread: time in its queue is another call's
            start = time.time()
            return function(*arguments), start, time.time()

        result, start, end = await asyncio.get_running_loop().run_in_executor(self.thread, timed)
        self.reports.spent(activity, start - delay, end, rows, step)
        return result

    async def fire(
        self,
        stage: StageSpec,
        samples: Sequence[int],
        inputs: Sequence[Sequence[Place]],
        *,
        sampling: Sampling | None = None,
        step: int = -1,
    ) -> Fired:
        """Deal rows out to the ranks, let them work side by side, and collect what counts.

        Raises ValueError where a row did not leave exactly once, and whatever a rank's method raises.
        """
        assert self.ranks is not None, f"service {self.spec.name} is not started"
        cut = Partitioning(stage.protocol, stage.whole_groups, stage.balance == "tokens")
        topology, generation = self._layout(generates=sampling is not None)
        calls = plan_calls(
            stage.name,
            stage.method,
            cut,
            samples,
            inputs,
            stage.schemas,
            topology,
            generation=generation,
            step=step,
            sampling=sampling,
            all_ranks=self.spec.collective,
        )
        answers = await self._call(stage.name, calls)
        replies = {planned.rank: (planned, *answers[planned.rank]) for planned in calls}
        self._account(stage, [(planned.rank, reply) for planned, reply, _ in replies.values()], len(samples), step)
        collected = protocol(stage.protocol).collect(topology, generation=generation)
        fired = Fired(parts=[], failures=[], lost=[])
        metrics = []
        for planned, reply, payloads in (replies[rank] for rank in collected if rank in replies):
            _collect(fired, stage, planned, reply)
            fired.parts += parts_of(reply.shards, payloads)
            fired.drawn += reply.drawn
            if reply.metrics is not None:
                metrics.append(reply.metrics)
            for damaged in reply.damaged:
                self.counts.damaged(stage.inputs[damaged.input], len(damaged.rows))
        if metrics:
            fired.metrics = protocol("METRIC").combine(metrics)
        else:  # a protocol that deals out too few rows, or collects from too few ranks
            given = [sample for part in fired.parts for sample in part.shard.sample_ids]
            check_complete(stage.name, samples, [*given, *(f.sample_id for f in fired.failures), *fired.lost])
        return fired

    def _layout(self, *, generates: bool) -> tuple[Topology, GenerationGrouping | None]:
        """How the ranks stand for a firing. Fully sharded ones are replicas to train and tensor shards to generate."""
        topology = self.generation.topology if generates else self.topology
        return topology, self.generation if self.generation.topology == topology else None

    async def _call(self, what: str, calls: Sequence[RankCallPlan]) -> dict[int, tuple[RankReply, list[Payload]]]:
        assert self.ranks is not None
        ranks = self.ranks
        if self.spec.collective:
            return await self.collective.run(what, {c.rank: ranks.call(c.rank, c.call, c.payloads) for c in calls})
        async with asyncio.TaskGroup() as group:
            tasks = {
                c.rank: group.create_task(ranks.call(c.rank, c.call, c.payloads), name=f"{what} on rank {c.rank}")
                for c in calls
            }
        return {rank: task.result() for rank, task in tasks.items()}

    async def ask_ranks(self, request: RankRequest) -> tuple[Reply, list[Payload]]:
        """Have all ranks do something besides rows, account for its time, and return what rank 0 answers."""
        assert self.ranks is not None, f"service {self.spec.name} is not started"
        what, ranks = activity_of(request), self.ranks
        parts = {rank: ranks.ask(rank, request) for rank in range(self.topology.world_size)}
        answers = [answer for _, answer in sorted((await self.collective.run(what, parts)).items())]
        self.reports.spent(what, min(a.start for a, _ in answers), max(a.end for a, _ in answers))
        first, payloads = answers[0]
        return first.reply, payloads

    async def read(self, parts: Sequence[ShardRef], kind: type[B], edge: str) -> B:
        """All rows of some parts, read by the service itself. Raises PayloadLost, codec.BadFrame."""
        frames = [await self.store.get(part.payload) for part in parts]
        nbytes = sum(frame.nbytes for frame in frames)
        try:
            batch = await asyncio.to_thread(unpack, frames, kind) if nbytes > INLINE_READING else unpack(frames, kind)
            if batch.sample_ids.tolist() != [sample for part in parts for sample in part.shard.sample_ids]:
                raise codec.BadFrame("it holds other rows than its shard names")
        except codec.BadFrame as error:
            for frame in frames:
                self._quarantine.keep(frame, f"{edge}: {error.reason}")
            raise
        self.counts.read(edge, 0 if self.topology.world_size == 1 else -1, nbytes)
        return batch

    async def pack(self, batch: Batch, attempt: int = 0, *, direct: bool = False) -> list[ShardRef]:
        """Encode and put a batch that the service itself made."""
        spec = self.spec
        return await asyncio.get_running_loop().run_in_executor(
            self.thread,
            lambda: pack_apart(
                self.store, batch, spec.term, attempt, direct=direct, object_bytes=spec.limits.object_bytes
            ),
        )

    # --- the lease

    @asynccontextmanager
    async def lease(self, stage: str) -> AsyncIterator[None]:
        """The pool's devices, in calling order, and then the turn of ranks that work together."""
        async with self._devices(stage), self.collective.exclusive():
            yield

    @asynccontextmanager
    async def _devices(self, stage: str) -> AsyncIterator[None]:
        """Free of charge where nobody shares them."""
        if not self.spec.leased:
            yield
            return
        ticket = next(self._tickets)
        granted = self._grants[ticket] = asyncio.get_running_loop().create_future()
        self.reports.notify(LeaseAsked(ticket, stage))
        try:
            await granted
            yield
        finally:
            del self._grants[ticket]
            self.reports.notify(LeaseReturned(ticket))

    def grant(self, ticket: int) -> None:
        """The controller gives the lease that was asked for; a ticket no longer waited for returns by itself."""
        future = self._grants.get(ticket)
        if future is not None and not future.done():
            future.set_result(None)

    # --- sending

    async def send(
        self, stage: StageSpec, parts: Sequence[ShardRef], failures: list[Failure], *, attempt: int = 0, step: int = -1
    ) -> None:
        """Hand rows to every consumer of a stage; returns when all had room.

        What was sent is kept until its prompts end, so that a consumer that lost its memory can have it again.
        """
        if not parts and not failures:
            return
        self.subscriptions.offer(stage.name, parts)
        start = time.time()
        waiting = {target.edge for target in stage.outputs}
        self.reports.wait(stage.name, "credit", ", ".join(sorted(waiting)))
        async with asyncio.TaskGroup() as group:
            for target in stage.outputs:
                delivery = Delivery(
                    target.edge, self.spec.term, [part.shard for part in parts], failures, attempt, step
                )
                kept = OutboxEntry(target.service, delivery, list(parts))
                self.outbox.keep(target.edge, kept.samples, kept)
                group.create_task(self._hand_over(stage.name, kept, waiting), name=f"{stage.name} -> {target.edge}")
        self.reports.wait(stage.name)
        self.exporter.observe("channel_wait_seconds", time.time() - start, channel=stage.name, side="send")

    async def redeliver(self, edge: str) -> int:
        """Send again what an edge may have lost; how many deliveries. They refuse what they had."""
        again, who = self.outbox.kept(edge), f"redelivery to {edge}"
        for kept in again:
            self.reports.wait(who, "credit", edge)
            await self._hand_over(who, kept, {edge})
        self.reports.wait(who)
        return len(again)

    async def _hand_over(self, who: str, kept: OutboxEntry, waiting: set[str]) -> None:
        # Where the receiver is gone it stays in the outbox: the controller sees the same death and asks for it again.
        with contextlib.suppress(ServiceGone):
            await self.peers[kept.service].deliver(kept.delivery, [part.payload for part in kept.parts])
        waiting.discard(kept.delivery.edge)
        if waiting and who in self.reports.waits:
            self.reports.wait(who, "credit", ", ".join(sorted(waiting)), since=self.reports.waits[who].since)

    # --- losses

    def ask_again(self, stage: str, samples: Sequence[int]) -> tuple[list[int], list[Failure]]:
        """Rows whose bytes are gone: those that are sent again, and tombstones of those that were gone too often."""
        again, failures = self.losses.note(stage, [s for s in samples if prompt_of(s) not in self.ended])
        if again:
            self.reports.notify(RowsLost(stage, again))
        return again, failures

    # --- the end

    async def finish(self, last: Callable[[], None]) -> None:
        """Do one last thing in the compute thread, behind its current call, which may use what `last` frees."""
        await asyncio.get_running_loop().run_in_executor(self.thread, last)

    def close(self) -> None:
        """End the compute thread when its current call is done."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _account(self, stage: StageSpec, replies: list[tuple[int, RankReply]], rows: int, step: int) -> None:
        if not replies:
            return
        start, end = min(r.start for _, r in replies), max(r.end for _, r in replies)
        self.reports.spent(stage.name, start, end, rows, step)
        for rank, reply in replies:
            for edge, nbytes in zip(stage.inputs, reply.read_bytes, strict=False):
                self.counts.read(edge, rank, nbytes)


def _collect(fired: Fired, stage: StageSpec, planned: RankCallPlan, reply: RankReply) -> None:
    """Add one counting rank's failures to a firing; each of its rows has to leave exactly once."""
    mine = planned.call.sample_ids
    lost = [mine[position] for position in reply.lost]
    failures = [Failure(mine[position], d.cause) for d in reply.damaged for position in d.rows] + reply.failures
    fired.lost += lost
    fired.failures += failures
    if reply.metrics is None:
        given = [sample for shard in reply.shards for sample in shard.sample_ids]
        check_complete(stage.name, mine, [*given, *(f.sample_id for f in failures), *lost])


def check_complete(name: str, taken: Sequence[int], given: Sequence[int]) -> None:
    """Each row leaves exactly once, as a value or as a tombstone: one that vanished would be waited for at the join.

    Raises ValueError naming the stage and the first samples.
    """
    if sorted(given) != sorted(taken):
        wrong = sorted(set(given) ^ set(taken)) or sorted(s for s in set(given) if list(given).count(s) > 1)
        raise ValueError(f"{name}: took {len(taken)} rows and gave {len(given)}; not once each: samples {wrong[:4]}")
