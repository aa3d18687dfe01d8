"""StageContext: what the stages of a service share: ranks, the pool's lease, sending, and reports to the controller.

A stage that waits for credit in `send` holds no lease, no compute thread and no engine slot. It requests the lease once
it has all its inputs, and returns it before it sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from asyncflow.observe.exporter import Exporter
from asyncflow.observe.log import close_log, open_log
from asyncflow.services.channels.channel_counts import ChannelCounts
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceGone, Store
from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.lost_rows import LostRows
from asyncflow.services.channels.outbox import Outbox, OutboxEntry
from asyncflow.services.channels.shard_refs import (
    Partitioning,
    RankCallPlan,
    RowRef,
    ShardRef,
    pack_apart,
    plan_calls,
    unpack,
)
from asyncflow.services.channels.subscriptions import Subscriptions
from asyncflow.services.firing import Fired, collect
from asyncflow.services.lease_tickets import LeaseTickets
from asyncflow.services.ranks.collective_calls import CollectiveCalls
from asyncflow.services.ranks.quarantine import Quarantine
from asyncflow.services.ranks.rank import Ranks
from asyncflow.services.ranks.rank_requests import activity_of, described
from asyncflow.services.ranks.shared_process import computing
from asyncflow.services.ranks.spec import ServiceSpec, StageSpec
from asyncflow.services.reports import Reports
from protocols.control.delivery import Delivery, RankReply
from protocols.control.notices import RowsLost
from protocols.control.replies import Reply
from protocols.control.requests import RankRequest, SwitchLayout, YieldDevices
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol
from protocols.roles import Sampling
from protocols.stage import Failure

T = TypeVar("T")
B = TypeVar("B", bound=Batch)

INLINE_READING = 1 << 20  # bytes; checking more than this would hold up the event loop


class StageContext:
    """The shared state of a service's stages."""

    def __init__(self, spec: ServiceSpec, store: Store, exporter: Exporter) -> None:
        self.spec = spec
        self.store = store
        self.exporter = exporter
        self.log = open_log(spec.log_path)
        self.counts = ChannelCounts(exporter)
        self.subscriptions = Subscriptions([stage.name for stage in spec.stages if stage.outputs])
        self.peers: Mapping[str, Endpoint] = {}
        self.ranks: Ranks | None = None
        self.topology = spec.topology
        self.generation = spec.grouping
        self.collective = CollectiveCalls(spec.name, spec.collective)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"{spec.name}-compute")
        self._quarantine = Quarantine(spec.log_path, spec.name)
        self._begin()

    def _begin(self) -> None:
        """What belongs to one term."""
        self.finished = FinishedPrompts()
        self.outbox: Outbox[OutboxEntry] = Outbox(self.finished)
        self.lost_rows = LostRows()
        self.reports = Reports(self.spec.name, self.exporter)
        self._lease = LeaseTickets(self.reports, leased=self.spec.leased)

    def for_term(self, term: int) -> StageContext:
        """The context of a new term, with the same ranks and no rows.

        This one serves what is left of the old term: what it still sends names that term, so its receivers refuse it,
        and what it reports is not read.
        """
        context = copy.copy(self)
        context.spec = msgspec.structs.replace(self.spec, term=term)
        context._begin()
        self.reports.close()
        return context

    # --- working

    async def compute(
        self, activity: str, function: Callable[..., T], *arguments: Any, rows: int = 0, step: int = -1
    ) -> T:
        """Run blocking work in the service's compute thread and account for its time."""
        delay = self.spec.delay_seconds.get(activity.split("#", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1], 0.0)
        if delay:
            await asyncio.sleep(delay)

        def timed() -> tuple[T, float, float]:  # in the thread: time in its queue is another call's
            with computing():
                start = time.time()
                return function(*arguments), start, time.time()

        result, start, end = await asyncio.get_running_loop().run_in_executor(self.thread, timed)
        self.reports.spent(activity, start - delay, end, rows, step)
        return result

    async def fire(
        self,
        stage: StageSpec,
        samples: Sequence[int],
        inputs: Sequence[Sequence[RowRef]],
        *,
        sampling: Sampling | None = None,
        step: int = -1,
    ) -> Fired:
        """Distribute rows over the ranks, run them concurrently, and collect their outputs.

        Raises ValueError if a row did not leave exactly once, and what a rank's method raises.
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
        self._account(stage, {rank: reply for rank, (reply, _) in answers.items()}, len(samples), step)
        mine = {planned.rank: planned.call.sample_ids for planned in calls}
        collected = [r for r in protocol(stage.protocol).collect(topology, generation=generation) if r in mine]
        for damaged in (damaged for rank in collected for damaged in answers[rank][0].damaged):
            self.counts.damaged(stage.inputs[damaged.input], len(damaged.rows))
        return collect(stage.name, samples, [(mine[rank], *answers[rank]) for rank in collected])

    def _layout(self, *, generates: bool) -> tuple[Topology, GenerationGrouping | None]:
        """The ranks' layout in a firing: fully sharded ranks are replicas in training, tensor shards in generation."""
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
        """Have all ranks carry out a request, account for its time, and return the answer of rank 0."""
        assert self.ranks is not None, f"service {self.spec.name} is not started"
        what, ranks = activity_of(request), self.ranks
        parts = {rank: ranks.ask(rank, request) for rank in range(self.topology.world_size)}
        answers = [answer for _, answer in sorted((await self.collective.run(what, parts)).items())]
        start, end = min(a.start for a, _ in answers), max(a.end for a, _ in answers)
        self.reports.spent(what, start, end)
        if not isinstance(request, SwitchLayout | YieldDevices):  # these come with every step
            self.log.info("%s took %.2f s", described(request), end - start)
        first, payloads = answers[0]
        return first.reply, payloads

    async def read(self, parts: Sequence[ShardRef], kind: type[B], edge: str) -> B:
        """Read all rows of some shards in the coordinator. Raises PayloadLost, codec.BadFrame."""
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
        """Encode and store a batch that the coordinator computed."""
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
        """Hold the pool's devices, granted in order of request, and then the exclusive use of collective ranks."""
        async with self._lease.held(stage), self.collective.exclusive():
            yield

    def grant(self, ticket: int) -> None:
        """Grant a requested lease."""
        self._lease.grant(ticket)

    # --- sending

    async def send(
        self, stage: StageSpec, parts: Sequence[ShardRef], failures: list[Failure], *, attempt: int = 0, step: int = -1
    ) -> None:
        """Send rows to every consumer of a stage; returns when all had room.

        The outbox keeps them until their prompts are finished, for consumers that lose their state.
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
        """Send again what an edge may have lost. Returns the number of deliveries; duplicates are refused."""
        again, who = self.outbox.kept(edge), f"redelivery to {edge}"
        for kept in again:
            self.reports.wait(who, "credit", edge)
            await self._hand_over(who, kept, {edge})
        self.reports.wait(who)
        return len(again)

    async def _hand_over(self, who: str, kept: OutboxEntry, waiting: set[str]) -> None:
        # If the receiver is gone, the delivery stays in the outbox until the controller requests its redelivery.
        with contextlib.suppress(ServiceGone):
            await self.peers[kept.service].deliver(kept.delivery, [part.payload for part in kept.parts])
        waiting.discard(kept.delivery.edge)
        if waiting and who in self.reports.waits:
            self.reports.wait(who, "credit", ", ".join(sorted(waiting)), since=self.reports.waits[who].since)

    # --- losses

    def ask_again(self, stage: str, samples: Sequence[int]) -> tuple[list[int], list[Failure]]:
        """Report lost rows. Returns those that will be sent again, and tombstones for those lost too often."""
        again, failures = self.lost_rows.note(stage, [s for s in samples if prompt_of(s) not in self.finished])
        if again:
            self.reports.notify(RowsLost(stage, again))
        return again, failures

    # --- the end

    def close(self) -> None:
        """Shut the compute thread down after its current call, and close the log."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        close_log(self.log)

    def _account(self, stage: StageSpec, replies: Mapping[int, RankReply], rows: int, step: int) -> None:
        if not replies:
            return
        start, end = min(r.start for r in replies.values()), max(r.end for r in replies.values())
        self.reports.spent(stage.name, start, end, rows, step)
        for rank, reply in replies.items():
            for edge, nbytes in zip(stage.inputs, reply.read_bytes, strict=False):
                self.counts.read(edge, rank, nbytes)
