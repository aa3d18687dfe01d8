"""ModelService: mailboxes -> stages -> channels. The coordinator of one model, whose ranks do the work.

    deliver ──> mailbox ──> stage fires ──> each rank reads its rows, computes, puts ──> deliver to each consumer
    request ──> closing a batch, weights, state, direct calls
    notices <── complete prompts, finished steps, requests for the lease, time spent

A coordinator moves names and references, not the rows' bytes. Where the model computes is its `ServiceMode`. The event
loop never computes: its lag is a metric. Start, run and stop are the same in a Ray actor and in one process with all
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceGone, Store, causes
from asyncflow.services.channels.shard_refs import ShardRef, parts_of
from asyncflow.services.ranks.rank import Ranks
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import direct_call
from asyncflow.services.service_mode import ServiceMode, mode_of
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import ClosingStage, StageRunner, tombstones
from asyncflow.services.term_scope import TermOver, TermScope
from protocols.control.delivery import Delivery, ServiceStatistics
from protocols.control.notices import Notice, ServiceFailed
from protocols.control.replies import Done, Invoked, Refused, Reply, Statistics
from protocols.control.requests import (
    AbandonStep,
    BeginTerm,
    CloseBatch,
    EndPrompts,
    ExportModel,
    GetStatistics,
    Grant,
    Invoke,
    LoadState,
    LoadWeights,
    NextRows,
    Ping,
    PrepareCode,
    PutRows,
    Redeliver,
    Request,
    SaveState,
    SetPaused,
    Subscribe,
    SwitchCode,
    TakeRows,
    TakeSnapshot,
    Unsubscribe,
    YieldDevices,
)

WATCH_EVERY_SECONDS = 0.5
_FROM_OUTSIDE = Subscribe | NextRows | Unsubscribe | TakeRows | PutRows  # those who ask know no terms


class ModelService:
    """One service of a run. Implements `Endpoint`."""

    def __init__(self, spec: ServiceSpec, store: Store, ranks: Ranks | None = None) -> None:
        """`ranks`: of a service that has several; a single one works in this process."""
        self.spec = spec
        self._exporter = Exporter(spec.name)
        self._context = StageContext(spec, store, self._exporter)
        self._ranks = ranks
        self._mode: ServiceMode | None = None  # from `start` on
        self._runners: dict[str, StageRunner] = {}
        self._edges: dict[str, tuple[StageRunner, int]] = {}
        self._tasks: asyncio.Task[None] | None = None
        self._term = TermScope(spec.name)
        self._stopping, self._stopped = asyncio.Lock(), False
        self._beginning = asyncio.Lock()  # a term

    @property
    def name(self) -> str:
        return self.spec.name

    async def start(self, metrics_host: str = "127.0.0.1") -> int:
        """Load the model and open the metrics endpoint; its port."""
        self._term.start()
        mode = self._mode = await mode_of(self._context, self._ranks)
        await mode.start()
        self._make_runners(mode)
        return self._exporter.serve(metrics_host)

    def _make_runners(self, mode: ServiceMode) -> None:
        for stage in self.spec.stages:
            runner = self._runners[stage.name] = mode.runner(stage)
            self._edges |= {edge: (runner, position) for position, edge in enumerate(stage.inputs)}

    def connect(self, peers: Mapping[str, Endpoint]) -> None:
        """Set the consumers' endpoints and start to fire; called again when a consumer was replaced. After `start`."""
        assert self._mode is not None, f"service {self.name} is not started"
        self._context.peers = dict(peers)
        if self._tasks is None:
            self._fire()

    def _fire(self) -> None:
        self._tasks = asyncio.create_task(self._run(), name=f"service {self.name}")

    async def stop(self) -> None:
        """End the stages, then free the worker, the thread and the port. Idempotent: returns when that is done."""
        async with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            if self._term.end():
                self._context.log.info("%s stops", self.name)
            await self._end_stages()
            if (started := self._mode or self._ranks) is not None:
                await started.stop()
            self._context.close()
            await asyncio.to_thread(self._exporter.close)

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Put a delivery into the mailbox of its edge. Returns when there was room, or its term is over.

        Raises KeyError for an unknown edge, ServiceGone where the service has ended or ends while this waits.
        """
        if delivery.term < self.spec.term:
            return  # of an older term: its sender is about to be stopped, or to begin the new term
        if delivery.edge not in self._edges:
            raise KeyError(f"service {self.name} has no edge {delivery.edge!r}; it has {sorted(self._edges)}")
        runner, position = self._edges[delivery.edge]
        taking_in = runner.deliver(position, delivery, parts_of(delivery.shards, payloads))
        with contextlib.suppress(TermOver):
            await self._term.run("deliver", taking_in)

    async def notices(self) -> list[Notice]:
        """See Reports.notices. Empty where the term ends meanwhile; raises ServiceGone where the service has ended."""
        try:
            return await self._term.run("notices", self._context.reports.notices())
        except TermOver:
            return []

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        """Carry out a request. An error becomes a Refused reply with its cause."""
        try:
            if isinstance(request, BeginTerm):
                await self._begin_term(request.term)
                return Done(), []
            while True:
                try:
                    return await self._term.run(type(request).__name__, self._answer(request, payloads))
                except TermOver:
                    if not isinstance(request, _FROM_OUTSIDE):
                        raise
        except ServiceGone:
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - not swallowed: the caller gets it
            self._context.log.error("%s is refused: %s", type(request).__name__, causes(error))
            return Refused(causes(error)), []

    async def _answer(self, request: Request, payloads: Sequence[Payload]) -> tuple[Reply, list[Payload]]:
        mode = self._mode
        assert mode is not None, f"service {self.name} is not started"
        match request:
            case CloseBatch():
                return await self._closing.close(request), []
            case Invoke():
                return await self._invoke(mode, request, parts_of(request.shards, payloads))
            case LoadWeights():
                return await mode.load_weights(request, payloads), []
            case Subscribe() | NextRows() | Unsubscribe():
                return await self._context.subscriptions.answer(request)
            case TakeRows() | PutRows():
                return await mode.serve_worker(request, payloads)
            case _:
                return await self._control(mode, request)

    async def _control(self, mode: ServiceMode, request: Request) -> tuple[Reply, list[Payload]]:
        """Carry out what the controller alone requests; nothing here has rows."""
        match request:
            case TakeSnapshot() | SaveState() | LoadState() | ExportModel() | PrepareCode() | SwitchCode():
                return await mode.ask_ranks(request)
            case AbandonStep():
                return await self._context.ask_ranks(request)  # beside the collective call that it ends
            case YieldDevices():
                return await mode.yield_devices(request)
            case Ping():
                return Done(await mode.ping()), []
            case GetStatistics():
                return Statistics(self._statistics()), []
            case Grant():
                self._context.grant(request.ticket)
            case SetPaused():
                mode.pause(request.paused)
            case EndPrompts():
                await self._end(mode, request)
            case Redeliver():
                await self._context.redeliver(request.edge)
            case _:
                raise ValueError(f"{self.name} can't do {type(request).__name__}")
        return Done(), []

    async def _begin_term(self, term: int) -> None:
        """End the stages, wait until the ranks are done with the old term, and start stages that have no rows."""
        mode = self._mode
        assert mode is not None, f"service {self.name} is not started"
        async with self._beginning:  # a request for another term may come while this one waits
            if term <= self.spec.term:
                raise ValueError(f"term {term} is not newer than {self.spec.term}")
            async with self._context.collective.exclusive():  # a collective call must not be cancelled half way
                self.spec = msgspec.structs.replace(
                    self.spec, term=term
                )  # the old term's rows are refused from here on
                self._term.begin_next()
                await self._end_stages()
            self._context = self._context.for_term(term)
            await mode.begin_term(self._context)
            self._make_runners(mode)
            self._fire()
            self._context.log.info("%s begins term %d", self.name, term)

    async def _end_stages(self) -> None:
        if self._tasks is not None:
            self._tasks.cancel()
            await asyncio.gather(self._tasks, return_exceptions=True)

    async def _end(self, mode: ServiceMode, request: EndPrompts) -> None:
        for run in request.runs:
            self._context.finished.add_run(*run)
        self._context.outbox.end(request.prompts)
        self._context.lost_rows.end(request.prompts)
        for runner in self._runners.values():
            await runner.end(request.prompts)
        await mode.end(request.prompts)

    async def _invoke(self, mode: ServiceMode, request: Invoke, parts: list[ShardRef]) -> tuple[Reply, list[Payload]]:
        fired = await mode.invoke(direct_call(self.spec, request.method), request, parts)
        failures = fired.failures + tombstones(fired.lost, "its bytes are gone")
        return Invoked([part.shard for part in fired.parts], failures), [part.payload for part in fired.parts]

    def _statistics(self) -> ServiceStatistics:
        depths = {edge: runner.depth() for edge, (runner, _) in self._edges.items()}
        called = {edge: (0, 0, 0) for edge in self._context.counts.edges if edge not in depths}
        waits = self._context.reports.waits
        return ServiceStatistics(
            service=self.name,
            ranks=self._context.topology.world_size,
            edges=[self._context.counts.statistics(edge, *depth) for edge, depth in {**depths, **called}.items()],
            kept=len(self._context.outbox),
            waits={who: f"{w.what} on {w.on}" if w.on else w.what for who, w in sorted(waits.items())},
        )

    @property
    def _closing(self) -> ClosingStage:
        return next(r for r in self._runners.values() if isinstance(r, ClosingStage))

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._guard("watch", self._watch()), name=f"{self.name} watch")
                if self._mode is not None:
                    group.create_task(self._guard("generate", self._mode.run()), name=f"{self.name} engine")
                for name, runner in self._runners.items():
                    group.create_task(self._guard(name, runner.run()), name=name)
        except* _StageEnded:
            pass  # reported to the controller, which decides; the other stages are cancelled

    async def _guard(self, stage: str, work: Any) -> None:
        try:
            await work
        except Exception as error:
            self._context.reports.notify(ServiceFailed(self.name, stage, causes(error)))
            self._context.log.exception("%s failed", stage)
            raise _StageEnded(stage) from error

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_EVERY_SECONDS)
            self._exporter.observe("event_loop_lag_seconds", max(0.0, time.monotonic() - before - WATCH_EVERY_SECONDS))
            if self._mode is not None:
                self._mode.note_progress()
            for name, runner in self._runners.items():
                depth, capacity, _ = runner.depth()
                self._exporter.set("channel_depth", depth, channel=name)
                self._exporter.set("channel_capacity", capacity, channel=name)


class _StageEnded(Exception):
    """A stage raised; the controller has the cause already."""
