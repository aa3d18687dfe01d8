"""ModelService: mailboxes -> stage -> channels; the front of one model, whose ranks do the work.

    deliver ──> mailbox ──> stage fires ──> each rank reads its rows, computes, puts ──> deliver to each consumer
    request ──> closing a batch, weights, state, direct calls
    notices <── settled prompts, finished steps, leases, time spent

A front moves names and references; the rows' bytes pass it by. A service of one rank works in a thread of the
same process. The event loop never computes: its lag is a metric. Start, run and stop are the same in a Ray actor
and in one process with all the others.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceGone, Store, causes
from asyncflow.services.channels.shard_refs import ShardRef, parts_of, places
from asyncflow.services.colocated_generation import ColocatedGeneratingStage, ColocatedGeneration
from asyncflow.services.external_workers import ExternalRank
from asyncflow.services.generation import GeneratingStage, GenerationLoop, generate_now
from asyncflow.services.ranks.rank import OwnRank, Rank, Ranks
from asyncflow.services.ranks.rank_requests import BESIDE_THE_MODEL, activity_of
from asyncflow.services.ranks.spec import AdvantageSettings, ServiceSpec, StageSpec, effective_protocol
from asyncflow.services.ranks.worker_factory import LoadedWorker, build, contract_for
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import ClosingStage, RowStage, StageRunner, TrainingStage, tombstones
from protocols.control.delivery import Delivery, ServiceStatistics
from protocols.control.notices import Notice, ServiceFailed
from protocols.control.requests import (
    CloseBatch,
    Done,
    EndPrompts,
    ExportModel,
    GetStatistics,
    Grant,
    Installed,
    Invoke,
    Invoked,
    LoadState,
    LoadWeights,
    NextRows,
    PrepareCode,
    PutRows,
    RankRequest,
    Redeliver,
    Refused,
    Reply,
    Request,
    SaveState,
    SetPaused,
    Statistics,
    Subscribe,
    SwitchCode,
    TakeRows,
    TakeSnapshot,
    Unsubscribe,
    YieldDevices,
)
from protocols.data.messages import Prompts

LAG_EVERY_SECONDS = 0.5


class ModelService:
    """One service of a run. Implements `Endpoint`."""

    def __init__(self, spec: ServiceSpec, store: Store, ranks: Ranks | None = None) -> None:
        """`ranks`: of a service that has several, each in a place of its own; a single one is this process."""
        self.spec = spec
        self._exporter = Exporter(spec.name)
        self._host = StageContext(spec, store, self._exporter)
        self._ranks = ranks
        self._outside: ExternalRank | None = None
        self._workplace: LoadedWorker | None = None
        self._runners: dict[str, StageRunner] = {}
        self._loop: GenerationLoop | None = None
        # Whether its models can leave their devices: to be assumed until it has turned out, or they would be on
        # devices of which nobody knows that they have them.
        self._moves = spec.leased and (spec.collective or spec.accelerated)
        self._together = ColocatedGeneration(self._host) if spec.collective else None
        self._edges: dict[str, tuple[StageRunner, int]] = {}
        self._tasks: asyncio.Task[None] | None = None
        self._gone: asyncio.Future[None] | None = None  # done where the service has ended: nothing makes room any more

    @property
    def name(self) -> str:
        return self.spec.name

    async def start(self, metrics_host: str = "127.0.0.1") -> int:
        """Load the model and open the metrics endpoint; its port."""
        self._gone = asyncio.get_running_loop().create_future()
        if self.spec.external:
            self._ranks = self._outside = ExternalRank(self._host)
        elif self._ranks is None:
            self._workplace = await self._host.compute("start", build, self.spec)
            self._ranks = OwnRank(Rank(self.spec, self._workplace, self._host.store, self._host.thread))
            if self._workplace.engine is not None:
                self._loop = GenerationLoop(self._host, self._workplace.engine, self._workplace.load_trained)
        await self._ranks.start()
        self._host.ranks = self._ranks
        for stage in self.spec.stages:
            runner = self._runners[stage.name] = self._runner(stage)
            self._edges |= {edge: (runner, position) for position, edge in enumerate(stage.inputs)}
        return self._exporter.serve(metrics_host)

    def connect(self, peers: Mapping[str, Endpoint]) -> None:
        """Say where the consumers are, and begin to fire; again when one of them was restarted. After `start`."""
        assert self._ranks is not None, f"service {self.name} is not started"
        self._host.peers = dict(peers)
        if self._tasks is None:
            self._tasks = asyncio.create_task(self._run(), name=f"service {self.name}")

    async def stop(self) -> None:
        """End the stages, then free the worker, the thread and the port."""
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        if self._tasks is not None:
            self._tasks.cancel()
            await asyncio.gather(self._tasks, return_exceptions=True)
        if self._ranks is not None:
            await self._ranks.stop()
        if self._workplace is not None:
            await self._host.finish(self._workplace.close)
        self._host.close()
        await asyncio.to_thread(self._exporter.close)

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Hand to the mailbox of the edge; returns when there was room.

        Raises KeyError for an edge of nobody, ServiceGone where the service has ended or ends while this waits.
        """
        if delivery.term < self.spec.term:
            return  # of an abandoned lineage: its sender is about to be stopped
        if delivery.edge not in self._edges:
            raise KeyError(f"service {self.name} has no edge {delivery.edge!r}; it has {sorted(self._edges)}")
        runner, position = self._edges[delivery.edge]
        assert self._gone is not None, f"service {self.name} is not started"
        taking_in = runner.deliver(position, delivery, parts_of(delivery.shards, payloads))
        arriving = asyncio.create_task(taking_in, name=f"arrival on {delivery.edge}")
        try:
            await asyncio.wait((arriving, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise ServiceGone(f"{self.name}: deliver: it has ended")
            arriving.result()
        finally:
            arriving.cancel()

    async def notices(self) -> list[Notice]:
        """See Reports.notices."""
        return await self._host.reports.notices()

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        """Do what is asked; an error becomes a Refused reply with its cause."""
        try:
            return await self._answer(request, payloads)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it is not swallowed: the asker gets it
            return Refused(causes(error)), []

    async def _answer(self, request: Request, payloads: Sequence[Payload]) -> tuple[Reply, list[Payload]]:
        match request:
            case CloseBatch():
                return await self._closing.close(request), []
            case Invoke():
                return await self._invoke(request, parts_of(request.shards, payloads))
            case LoadWeights():
                return await self._load_weights(request, payloads)
            case GetStatistics():
                return Statistics(self._statistics()), []
            case Subscribe() | NextRows() | Unsubscribe() | TakeRows() | PutRows():
                return await self._serve_outside(request, payloads)
            case _:
                return await self._do(request)

    async def _load_weights(self, request: LoadWeights, payloads: Sequence[Payload]) -> tuple[Reply, list[Payload]]:
        assert self._loop is not None
        buffer = await self._host.store.get(payloads[0])
        return Installed(await self._loop.load(request.manifest, buffer)), []

    async def _serve_outside(
        self, request: Subscribe | NextRows | Unsubscribe | TakeRows | PutRows, payloads: Sequence[Payload]
    ) -> tuple[Reply, list[Payload]]:
        if isinstance(request, Subscribe | NextRows | Unsubscribe):
            return await self._host.subscriptions.answer(request)
        if self._outside is None:
            raise ValueError(f"service {self.name} does its work itself, its model is not outside")
        return await self._outside.answer(request, payloads)

    async def _do(self, request: Request) -> tuple[Reply, list[Payload]]:
        match request:
            case PrepareCode() | SwitchCode() if self._outside is not None:
                pass  # an outside worker has its code where it is
            case TakeSnapshot() | SaveState() | LoadState() | ExportModel() | PrepareCode() | SwitchCode():
                return await self._ask_ranks(request)
            case YieldDevices():
                return await self._leave_devices(request)
            case Grant():
                self._host.grant(request.ticket)
            case SetPaused():
                if generating := self._loop or self._together:
                    generating.pause(request.paused)
            case EndPrompts():
                for run in request.runs:
                    self._host.ended.add_run(*run)
                self._host.outbox.end(request.prompts)
                self._host.losses.end(request.prompts)
                for runner in self._runners.values():
                    await runner.end(request.prompts)
                if self._outside is not None:
                    await self._outside.end(request.prompts)
            case Redeliver():
                await self._host.redeliver(request.edge)
            case _:
                raise ValueError(f"{self.name} can't do {type(request).__name__}")
        return Done(), []

    async def _ask_ranks(self, request: RankRequest) -> tuple[Reply, list[Payload]]:
        # A model that is off its devices comes back for this, so it has to have them; at its start it has no lease yet.
        if self._moves and not isinstance(request, (LoadState, *BESIDE_THE_MODEL)):
            async with self._host.lease(f"{self.name} {activity_of(request)}"):
                return await self._host.ask_ranks(request)
        async with self._host.collective.exclusive():
            return await self._host.ask_ranks(request)

    async def _leave_devices(self, request: YieldDevices) -> tuple[Reply, list[Payload]]:
        if self._outside is not None:
            return Done({"moves": 0.0}), []
        async with self._host.collective.exclusive():
            reply, _ = await self._host.ask_ranks(request)
        self._moves = isinstance(reply, Done) and bool(reply.values["moves"])
        return reply, []

    async def _invoke(self, request: Invoke, parts: list[ShardRef]) -> tuple[Reply, list[Payload]]:
        if request.sampling is not None and self._loop is not None:
            prompts = await self._host.read(parts, Prompts, f"{self.name}.{request.method} invoked")
            result, failures = await generate_now(self._loop, prompts, request.sampling)
            given = await self._host.pack(result) if result is not None else []
        else:
            stage = _direct_call(self.spec, request.method)
            rows = places(parts)
            samples, inputs = [sample for sample, _ in rows], [[place for _, place in rows]]
            if request.sampling is not None and self._together is not None:
                fired = await self._together.draw(stage, samples, inputs, request.sampling)
            else:
                async with self._host.lease(stage.name):
                    fired = await self._host.fire(stage, samples, inputs)
            given, failures = fired.parts, fired.failures + tombstones(fired.lost, "its bytes are gone")
        return Invoked([part.shard for part in given], failures), [part.payload for part in given]

    def _statistics(self) -> ServiceStatistics:
        depths = {edge: runner.depth() for edge, (runner, _) in self._edges.items()}
        called = {edge: (0, 0, 0) for edge in self._host.counts.edges if edge not in depths}
        waits = self._host.reports.waits
        return ServiceStatistics(
            service=self.name,
            ranks=self._host.topology.world_size,
            edges=[self._host.counts.statistics(edge, *depth) for edge, depth in {**depths, **called}.items()],
            kept=len(self._host.outbox),
            waits={who: f"{w.what} on {w.on}" if w.on else w.what for who, w in sorted(waits.items())},
        )

    @property
    def _closing(self) -> ClosingStage:
        return next(r for r in self._runners.values() if isinstance(r, ClosingStage))

    def _runner(self, stage: StageSpec) -> StageRunner:
        match stage.fires:
            case "generate" if self._together is not None:
                return ColocatedGeneratingStage(self._host, stage, self._together)
            case "generate":
                assert self._loop is not None
                return GeneratingStage(self._host, stage, self._loop)
            case "closed":
                assert self._workplace is not None
                trainable = self._workplace.method(stage.filter) if stage.filter else None
                function, settings = self._workplace.method(stage.method), self.spec.settings
                parts = settings.reward_parts if isinstance(settings, AdvantageSettings) else ()
                return ClosingStage(self._host, stage, function, trainable, parts)
            case "batch":
                return TrainingStage(self._host, stage)
            case "rows":
                return RowStage(self._host, stage)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._guard("loop lag", self._watch_lag()), name=f"{self.name} loop lag")
                if self._loop is not None:
                    group.create_task(self._guard("generate", self._loop.run()), name=f"{self.name} engine")
                for name, runner in self._runners.items():
                    group.create_task(self._guard(name, runner.run()), name=name)
        except* _StageEnded:
            pass  # reported to the controller, which decides; the other stages are down with it

    async def _guard(self, stage: str, work: Any) -> None:
        try:
            await work
        except Exception as error:
            self._host.reports.notify(ServiceFailed(self.name, stage, causes(error)))
            traceback.print_exc()
            raise _StageEnded(stage) from error

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_EVERY_SECONDS)
            self._exporter.observe("event_loop_lag_seconds", max(0.0, time.monotonic() - before - LAG_EVERY_SECONDS))
            for name, runner in self._runners.items():
                depth, capacity, _ = runner.depth()
                self._exporter.set("channel_depth", depth, channel=name)
                self._exporter.set("channel_capacity", capacity, channel=name)


def _direct_call(spec: ServiceSpec, method: str) -> StageSpec:
    """A stage outside the dataflow: nobody feeds it, and it feeds nobody."""
    contract = contract_for(spec.role, method)
    name = f"{spec.name}.{method} invoked"
    return StageSpec(
        name=name,
        method=method,
        fires="rows",
        inputs=[f"{name}.{position}" for position in range(len(contract.consumes))],
        schemas=[kind.schema_id for kind in contract.consumes],
        sources=[],
        outputs=[],
        protocol=effective_protocol(contract.protocol, spec.topology),
    )


class _StageEnded(Exception):
    """A stage raised; the cause is with the controller already."""
