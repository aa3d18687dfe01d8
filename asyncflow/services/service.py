"""ModelService: mailboxes -> stage -> channels, one model, one event loop, one compute thread.

    deliver ──> mailbox ──> stage fires ──> compute thread ──> encode once ──> deliver to each consumer
    request ──> closing a batch, weights, state, direct calls
    notices <── settled prompts, finished steps, leases, time spent

The event loop never computes: its lag is a metric. Start, run and stop are the same in a Ray actor and in
one process with all the others.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping
from typing import Any

from asyncflow.observe.exporter import Exporter
from asyncflow.services.endpoint import Endpoint, Payload, Store, causes
from asyncflow.services.generation import GeneratingStage, GenerationLoop, generate_now
from asyncflow.services.host import Host
from asyncflow.services.spec import ServiceSpec, StageSpec
from asyncflow.services.stages import ClosingStage, RowStage, StageRunner, TrainingStage, unwrap
from asyncflow.services.workplace import Workplace, build
from protocols import codec
from protocols.control import (
    CloseBatch,
    Delivery,
    Done,
    ExportModel,
    Grant,
    Installed,
    Invoke,
    Invoked,
    LoadState,
    LoadWeights,
    Notice,
    Refused,
    Reply,
    Request,
    SaveState,
    ServiceFailed,
    SetPaused,
    SnapshotTaken,
    TakeSnapshot,
)
from protocols.messages import SCHEMAS, Prompts

LAG_EVERY_SECONDS = 0.5


class ModelService:
    """One service of a run. Implements `Endpoint`."""

    def __init__(self, spec: ServiceSpec, store: Store) -> None:
        self.spec = spec
        self._exporter = Exporter(spec.name)
        self._host = Host(spec, store, self._exporter)
        self._workplace: Workplace | None = None
        self._runners: dict[str, StageRunner] = {}
        self._loop: GenerationLoop | None = None
        self._edges: dict[str, tuple[StageRunner, int]] = {}
        self._tasks: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    async def start(self, metrics_host: str = "127.0.0.1") -> int:
        """Load the model and open the metrics endpoint; its port."""
        self._workplace = await self._host.compute("start", build, self.spec)
        if self._workplace.engine is not None:
            self._loop = GenerationLoop(self._host, self._workplace.engine, self._workplace.follow)
        for stage in self.spec.stages:
            runner = self._runners[stage.name] = self._runner(stage)
            self._edges |= {edge: (runner, position) for position, edge in enumerate(stage.inputs)}
        return self._exporter.serve(metrics_host)

    def connect(self, peers: Mapping[str, Endpoint]) -> None:
        """Say where the consumers are, and begin to fire."""
        self._host.peers = peers
        self._tasks = asyncio.create_task(self._run(), name=f"service {self.name}")

    async def stop(self) -> None:
        """End the stages, then free the worker, the thread and the port."""
        if self._tasks is not None:
            self._tasks.cancel()
            await asyncio.gather(self._tasks, return_exceptions=True)
        if self._workplace is not None:
            await self._host.finish(self._workplace.close)
        self._host.close()
        await asyncio.to_thread(self._exporter.close)

    async def deliver(self, delivery: Delivery, payload: Payload | None) -> None:
        """Decode and hand to the mailbox; returns when there was room. Raises codec.BadFrame, KeyError."""
        if delivery.term < self.spec.term:
            return  # of an abandoned lineage: its sender is about to be stopped
        if delivery.edge not in self._edges:
            raise KeyError(f"service {self.name} has no edge {delivery.edge!r}; it has {sorted(self._edges)}")
        runner, position = self._edges[delivery.edge]
        batch = None
        if payload is not None:
            frame = await self._host.store.get(payload)
            schema = runner.spec.schemas[position]
            batch = codec.decode(frame, schemas={schema: SCHEMAS[schema]})  # an edge carries one type of message
            self._exporter.inc("channel_bytes_total", frame.nbytes, channel=delivery.edge)
        await runner.accept(position, batch, delivery.failures, delivery.step)

    async def notices(self) -> list[Notice]:
        """See Host.notices."""
        return await self._host.notices()

    async def request(self, request: Request, payload: Payload | None = None) -> tuple[Reply, Payload | None]:
        """Do what is asked; an error becomes a Refused reply with its cause."""
        try:
            return await self._answer(request, payload)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it is not swallowed: the asker gets it
            return Refused(causes(error)), None

    async def _answer(self, request: Request, payload: Payload | None) -> tuple[Reply, Payload | None]:
        match request:
            case Grant():
                self._host.grant(request.ticket)
            case CloseBatch():
                return await self._closing.close(request), None
            case Invoke():
                return await self._invoke(request, payload)
            case TakeSnapshot():
                manifest, buffer = await self._host.compute("publish", self._worker.snapshot, request.version)
                return SnapshotTaken(manifest), self._host.store.put(buffer)
            case LoadWeights():
                assert self._loop is not None and payload is not None
                buffer = await self._host.store.get(payload)
                return Installed(await self._loop.load(request.manifest, buffer)), None
            case SaveState():
                await self._host.compute("checkpoint", self._worker.save, request.folder)
            case LoadState():
                await self._host.compute("restore", self._worker.load, request.folder)
            case ExportModel():
                await self._host.compute("export", self._worker.export, request.folder)
            case SetPaused():
                if self._loop is not None:
                    self._loop.pause(request.paused)
        return Done(), None

    async def _invoke(self, request: Invoke, payload: Payload | None) -> tuple[Reply, Payload | None]:
        batch = codec.decode(await self._host.store.get(payload))
        if request.sampling is not None and self._loop is not None:
            assert isinstance(batch, Prompts)
            result, failures = await generate_now(self._loop, batch, request.sampling)
        else:
            assert self._workplace is not None
            async with self._host.lease(f"{self.name}.{request.method}"):
                given = await self._host.compute(request.method, self._workplace.method(request.method), batch)
            result, failures = unwrap(given)
        answer = self._host.store.put(codec.encode(result, term=self.spec.term)) if result is not None else None
        return Invoked(failures), answer

    @property
    def _worker(self) -> Any:
        assert self._workplace is not None, f"service {self.name} is not started"
        return self._workplace.worker

    @property
    def _closing(self) -> ClosingStage:
        return next(r for r in self._runners.values() if isinstance(r, ClosingStage))

    def _runner(self, stage: StageSpec) -> StageRunner:
        assert self._workplace is not None
        match stage.fires:
            case "generate":
                assert self._loop is not None
                return GeneratingStage(self._host, stage, self._loop)
            case "closed":
                return ClosingStage(self._host, stage, self._workplace.method(stage.method))
            case "batch":
                return TrainingStage(self._host, stage, self._workplace.method(stage.method))
            case "rows":
                return RowStage(self._host, stage, self._workplace.method(stage.method))

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
            self._host.notify(ServiceFailed(self.name, stage, causes(error)))
            traceback.print_exc()
            raise _StageEnded(stage) from error

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_EVERY_SECONDS)
            self._exporter.observe("event_loop_lag_seconds", max(0.0, time.monotonic() - before - LAG_EVERY_SECONDS))
            for name, runner in self._runners.items():
                depth, capacity = runner.depth()
                self._exporter.set("channel_depth", depth, channel=name)
                self._exporter.set("channel_capacity", capacity, channel=name)


class _StageEnded(Exception):
    """A stage raised; the cause is with the controller already."""
