"""ServiceMode: where a service's model computes. Chosen once, when the service starts.

ServiceMode    several ranks that work independently of each other
LocalMode      one rank, in the compute thread of the coordinator's process
EngineMode     a local one with an engine that generates: a generator, or a policy that shares its model
ColocatedMode  ranks that work together: they switch between the layouts for training and for generation
ExternalMode   an external worker, which takes rows and puts answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asyncflow.observe import memory
from asyncflow.services.channels.endpoint import Payload
from asyncflow.services.channels.shard_refs import ShardRef, row_refs
from asyncflow.services.colocated_generation import ColocatedGeneratingStage, ColocatedGeneration
from asyncflow.services.external_workers import ExternalRank
from asyncflow.services.firing import Fired
from asyncflow.services.generating_stage import GeneratingStage
from asyncflow.services.generation import GenerationLoop, generate_now
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.rank import LocalRanks, Rank, Ranks
from asyncflow.services.ranks.rank_requests import BESIDE_THE_MODEL, activity_of
from asyncflow.services.ranks.spec import AdvantageSettings, StageSpec
from asyncflow.services.ranks.worker_factory import build
from asyncflow.services.shown_samples import SampleShow
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import ClosingStage, RowStage, StageRunner, TrainingStage
from protocols.control.replies import Done, Installed, Reply
from protocols.control.requests import (
    BeginTerm,
    Invoke,
    LoadState,
    LoadWeights,
    Ping,
    PrepareCode,
    PutRows,
    RankRequest,
    SwitchCode,
    TakeRows,
    YieldDevices,
)
from protocols.data.messages import Prompts
from workers.generation.engine import Engine


class ServiceMode:
    """Several independent ranks, and what all modes do alike: plain stages, direct calls, requests to all ranks."""

    def __init__(self, context: StageContext, ranks: Ranks) -> None:
        self._context, self._ranks = context, ranks
        spec = context.spec
        # Whether its models can leave their devices. Assumed until the ranks answered: otherwise they could occupy
        # devices without a lease.
        self._moves = spec.leased and (spec.collective or spec.accelerated)

    async def start(self) -> None:
        """Load the ranks' models. Raises ServiceError naming the rank that failed."""
        await self._ranks.start()
        self._context.ranks = self._ranks

    async def run(self) -> None:
        """The mode's own loop, beside those of the stages."""

    def note_progress(self) -> None:
        """Report how far a long piece of work has come."""

    async def stop(self) -> None:
        """Free the ranks."""
        await self._ranks.stop()

    def runner(self, stage: StageSpec) -> StageRunner:
        """A stage at work. Raises ValueError for a stage that this mode can't run."""
        match stage.fires:
            case "batch":
                return TrainingStage(self._context, stage)
            case "rows":
                return RowStage(self._context, stage)
            case fires:
                raise ValueError(f"{stage.name}: {type(self).__name__} has no stage that fires on {fires!r}")

    async def invoke(self, stage: StageSpec, request: Invoke, parts: Sequence[ShardRef]) -> Fired:
        """Fire once on these rows, outside the dataflow."""
        rows = row_refs(parts)
        async with self._context.lease(stage.name):
            return await self._context.fire(stage, [sample for sample, _ in rows], [[place for _, place in rows]])

    async def ask_ranks(self, request: RankRequest) -> tuple[Reply, list[Payload]]:
        """Have all ranks carry out a request; rank 0 answers."""
        # A model that is off its devices is reloaded for this, so it needs the lease; at its start it has none yet.
        if self._moves and not isinstance(request, (LoadState, *BESIDE_THE_MODEL)):
            async with self._context.lease(f"{self._context.spec.name} {activity_of(request)}"):
                return await self._context.ask_ranks(request)
        async with self._context.collective.exclusive():
            return await self._context.ask_ranks(request)

    async def ping(self) -> dict[str, float]:
        """Wait until every rank has answered, beside the calls that it computes. Returns their processes' memory."""
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(self._ranks.ask(rank, Ping()), name=f"ping rank {rank}")
                for rank in range(self._context.topology.world_size)
            ]
        replies = [answer.result()[0].reply for answer in answers]
        return memory.total(reply.values for reply in replies if isinstance(reply, Done))

    async def yield_devices(self, request: YieldDevices) -> tuple[Reply, list[Payload]]:
        """Offload the models, and note whether they can leave their devices."""
        async with self._context.collective.exclusive():
            reply, _ = await self._context.ask_ranks(request)
        self._moves = isinstance(reply, Done) and bool(reply.values["moves"])
        return reply, []

    async def begin_term(self, context: StageContext) -> None:
        """Work for the context of a new term, when the ranks have finished what they compute for the old one."""
        self._context = context
        async with context.collective.exclusive():
            await context.ask_ranks(BeginTerm(context.spec.term))

    async def load_weights(self, request: LoadWeights, payloads: Sequence[Payload]) -> Installed:
        """Install a published version. Raises ValueError where no engine is."""
        raise ValueError(f"service {self._context.spec.name} has no engine to load weights into")

    def pause(self, paused: bool) -> None:
        """Start no more generation, or go on."""

    async def end(self, prompts: list[int]) -> None:
        """These prompts are finished: forget their rows."""

    async def serve_worker(
        self, request: TakeRows | PutRows, payloads: Sequence[Payload]
    ) -> tuple[Reply, list[Payload]]:
        """Give rows to an external worker, or take its answers. Raises ValueError if this service has none."""
        raise ValueError(f"service {self._context.spec.name} does its work itself, it has no external workers")


class LocalMode(ServiceMode):
    """One rank, in the compute thread of this process."""

    def __init__(self, context: StageContext, worker: LoadedWorker) -> None:
        super().__init__(context, _own_rank(context, worker))
        self._method = worker.method

    def runner(self, stage: StageSpec) -> StageRunner:
        if stage.fires != "closed":
            return super().runner(stage)
        trainable = self._method(stage.filter) if stage.filter else None
        settings = self._context.spec.settings
        method = self._method(stage.method)
        if not isinstance(settings, AdvantageSettings):
            return ClosingStage(self._context, stage, method, trainable)
        show = SampleShow(settings.samples, settings.tokenizer_path)
        return ClosingStage(self._context, stage, method, trainable, partial=settings.partial_groups, show=show)


class EngineMode(LocalMode):
    """One rank with an engine, whose loop generates between two loads of weights."""

    def __init__(self, context: StageContext, worker: LoadedWorker, engine: Engine) -> None:
        super().__init__(context, worker)
        self._loop = GenerationLoop(context, engine, worker.load_trained)

    async def run(self) -> None:
        await self._loop.run()

    def note_progress(self) -> None:
        self._loop.note_progress()

    def runner(self, stage: StageSpec) -> StageRunner:
        generates = stage.fires == "generate"
        return GeneratingStage(self._context, stage, self._loop) if generates else super().runner(stage)

    async def invoke(self, stage: StageSpec, request: Invoke, parts: Sequence[ShardRef]) -> Fired:
        if request.sampling is None:
            return await super().invoke(stage, request, parts)
        prompts = await self._context.read(parts, Prompts, stage.name)
        rollouts, failures = await generate_now(self._loop, prompts, request.sampling)
        return Fired(await self._context.pack(rollouts) if rollouts is not None else [], failures)

    async def begin_term(self, context: StageContext) -> None:
        await super().begin_term(context)
        await self._loop.begin_term(context)

    async def load_weights(self, request: LoadWeights, payloads: Sequence[Payload]) -> Installed:
        buffer = await self._context.store.get(payloads[0])
        return Installed(await self._loop.load(request.manifest, buffer))

    def pause(self, paused: bool) -> None:
        self._loop.pause(paused)


class ColocatedMode(ServiceMode):
    """Ranks that work together, or one that generates with an engine of its own: they switch layouts to generate."""

    def __init__(self, context: StageContext, ranks: Ranks) -> None:
        super().__init__(context, ranks)
        self._generation = ColocatedGeneration(context)

    async def begin_term(self, context: StageContext) -> None:
        await super().begin_term(context)
        self._generation.begin_term(context)

    def runner(self, stage: StageSpec) -> StageRunner:
        if stage.fires == "generate":
            return ColocatedGeneratingStage(self._context, stage, self._generation)
        return super().runner(stage)

    async def invoke(self, stage: StageSpec, request: Invoke, parts: Sequence[ShardRef]) -> Fired:
        if request.sampling is None:
            return await super().invoke(stage, request, parts)
        rows = row_refs(parts)
        samples, inputs = [sample for sample, _ in rows], [[place for _, place in rows]]
        return await self._generation.generate(stage, samples, inputs, request.sampling)

    def pause(self, paused: bool) -> None:
        self._generation.pause(paused)


class ExternalMode(ServiceMode):
    """External workers compute: each has its own code and its own devices."""

    def __init__(self, context: StageContext, rank: ExternalRank) -> None:
        super().__init__(context, rank)
        self._rank = rank

    async def ask_ranks(self, request: RankRequest) -> tuple[Reply, list[Payload]]:
        return (Done(), []) if isinstance(request, PrepareCode | SwitchCode) else await super().ask_ranks(request)

    async def begin_term(self, context: StageContext) -> None:
        self._context = context
        self._rank.begin_term(context)

    async def ping(self) -> dict[str, float]:
        """The process answers; a worker has a deadline for its rows."""
        return memory.total([])

    async def yield_devices(self, request: YieldDevices) -> tuple[Reply, list[Payload]]:
        return Done({"moves": 0.0}), []

    async def end(self, prompts: list[int]) -> None:
        await self._rank.end(prompts)

    async def serve_worker(
        self, request: TakeRows | PutRows, payloads: Sequence[Payload]
    ) -> tuple[Reply, list[Payload]]:
        return await self._rank.answer(request, payloads)


async def mode_of(context: StageContext, ranks: Ranks | None) -> ServiceMode:
    """The mode that a service's spec asks for; `ranks`: of a service that has several. Builds a local worker."""
    spec = context.spec
    if spec.external:
        return ExternalMode(context, ExternalRank(context))
    if ranks is not None:
        return ColocatedMode(context, ranks) if spec.collective else ServiceMode(context, ranks)
    worker = await context.compute("start", build, spec)
    if spec.collective:
        return ColocatedMode(context, _own_rank(context, worker))
    return EngineMode(context, worker, worker.engine) if worker.engine is not None else LocalMode(context, worker)


def _own_rank(context: StageContext, worker: LoadedWorker) -> LocalRanks:
    spec, store = context.spec, context.store
    return LocalRanks(spec, store, Rank(spec, worker, store, context.thread))
