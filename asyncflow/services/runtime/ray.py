"""RayRuntime runs each service as an async Ray actor, and each rank of a service with several as another actor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError

from asyncflow.services.channels.endpoint import ServiceError, ServiceGone, all_or_error, causes
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.runtime import Load, Started, ray_session, wire
from asyncflow.services.runtime.pools import NO_DEVICE, PoolRequest, ReservedPools
from asyncflow.services.runtime.ray_actors import RankActor, ServiceActor
from asyncflow.services.runtime.ray_peers import RayEndpoint, called
from asyncflow.services.runtime.ray_store import RayStore
from asyncflow.services.runtime.signals import keep_sigterm

START_SECONDS = 300.0
STOP_SECONDS = 10.0
OBJECT_BYTES = 1 << 20  # of one object, which a reader on another node fetches whole
NO_POOLS: Mapping[str, PoolRequest] = MappingProxyType({})
_program_log = logging.getLogger("asyncflow")
CONCURRENT_CALLS = 1000  # of one actor; each delivery that waits for credit is a call in flight


class RayRuntime:
    """Implements `Runtime`, on the Ray that this process is connected to; see ray_session.py for when there is none."""

    def __init__(
        self,
        inline_bytes: int,
        address: str = "",
        cpus: int | None = None,
        store_bytes: int = 0,
        pools: Mapping[str, PoolRequest] = NO_POOLS,
        wired: bool = wire.AVAILABLE,
        tell: Callable[[str], None] = _program_log.warning,
    ) -> None:
        """Args:

        inline_bytes: larger frames are stored instead of travelling inside a message.
        store_bytes: memory of a local Ray's object store, 0 for Ray's default; objects beyond it spill to disk. On a
            single node the processes' shared memory takes up to half as much in addition.
        pools: the devices of the services placed in these pools; other services need none.
        wired: processes of one node also call each other over sockets (wire.py); else through Ray alone.
        tell: gets what the start has to wait for, at once.
        """
        self.store = RayStore(inline_bytes)
        self.warnings: list[str] = []
        self._address = address
        self._cpus = cpus
        self._store_bytes = store_bytes
        self._specs: dict[str, ServiceSpec] = {}
        self._actors: dict[str, Any] = {}
        self._ranks: dict[str, list[Any]] = {}
        self._endpoints: dict[str, RayEndpoint] = {}
        self._pools = ReservedPools(pools)
        self._wired = wired
        self._tell = tell
        self.loads: dict[str, Load] = {}
        self._joining: Future[list[str]] | None = None
        self._starts_ray = False
        self._namespace = (
            f"asyncflow-{secrets.token_hex(8)}"  # of the actors' names: folders of two runs may be namesakes
        )
        self._restarting = asyncio.Lock()

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Start all actors concurrently, wait until each has loaded its model, then connect them."""
        self._starts_ray = ray_session.starts_ray(self._address)
        self._joining = ray_session.join_in_thread(self._address, self._cpus, self._store_bytes)
        with keep_sigterm():
            self.warnings += await ray_session.join_within(ray_session.JOIN_SECONDS, self._joining, self._address)
        await self._pools.reserve(specs, self._tell)
        if len(ray.nodes()) > 1:
            specs = [_limited(spec, object_bytes=OBJECT_BYTES) for spec in specs]
        elif self._wired:
            self.store.shared_bytes = _shared_bytes(specs)
            specs = [_limited(spec, shared_bytes=self.store.shared_bytes) for spec in specs]
        for spec in specs:
            self._create(spec)
        started: dict[str, Started] = {}
        async with all_or_error() as group:
            for spec in specs:
                group.create_task(self._await_start(spec, started), name=f"start {spec.name}")
        await self._connect()
        return started

    async def restart(self, names: Sequence[str], term: int) -> dict[str, Started]:
        """Replace services whose processes are gone or have to be killed, and reconnect all.

        The replacements start without state: in the same term their senders have to send again (`Redeliver`), and a
        generator has to load its weights again.
        """
        async with self._restarting:  # of two that die together, none may be connected before it has started
            started: dict[str, Started] = {}
            for name in names:
                self.kill(name)
                self._create(msgspec.structs.replace(self._specs[name], term=term))
            async with all_or_error() as group:
                for name in names:
                    group.create_task(self._await_start(self._specs[name], started), name=f"start {name}")
            await self._connect()
            return started

    def kill(self, name: str) -> None:
        """Kill a service's processes; Ray does so from outside of them, so they need not answer."""
        for actor in [self._actors[name], *self._ranks.get(name, [])]:
            ray.kill(actor)

    def _create(self, spec: ServiceSpec) -> None:
        code = list(dict.fromkeys([*spec.code, *ray_session.later_paths()]))
        complete = msgspec.structs.replace(spec, code=code, accelerated=self._pools.accelerates(spec))
        packed = msgspec.msgpack.encode(complete)
        count = spec.topology.world_size
        name = f"{spec.name}-{secrets.token_hex(8)}" if self._wired else ""
        rank_names = [name and f"{name}-{rank}" for rank in range(count if count > 1 else 0)]
        process = {"max_restarts": 0, **ray_session.process_options()}
        rank_actor: Any = ray.remote(RankActor)
        ranks = [
            rank_actor.options(**process, **self._pools.options(spec, rank)).remote(packed, rank_name, rank)
            for rank, rank_name in enumerate(rank_names)
        ]
        coordinator: Any = ray.remote(ServiceActor)
        self._specs[spec.name] = spec
        self._ranks[spec.name] = ranks
        self._actors[spec.name] = coordinator.options(
            name=f"{spec.run}/{spec.name}",
            namespace=self._namespace,
            **process,
            max_concurrency=CONCURRENT_CALLS,
            **(NO_DEVICE if ranks else self._pools.options(spec)),
        ).remote(packed, name, ranks, rank_names)
        self._endpoints[spec.name] = RayEndpoint(spec.name, self._actors[spec.name], name, self.store)

    async def _connect(self) -> None:
        async with all_or_error() as group:
            for name, actor in self._actors.items():
                group.create_task(self._connect_one(name, actor), name=f"connect {name}")

    async def _connect_one(self, name: str, actor: Any) -> None:
        # The controller notices a service that died meanwhile, and connects its replacement.
        with contextlib.suppress(ServiceGone):
            wires = {name: endpoint.wire for name, endpoint in self._endpoints.items()}
            await called(name, "connect", actor.connect, self._actors, wires)

    async def _await_start(self, spec: ServiceSpec, started: dict[str, Started]) -> None:
        actor = self._actors[spec.name]
        load = self.loads[spec.name] = Load(time.monotonic())
        try:
            async with asyncio.timeout(START_SECONDS):
                host, port = await actor.start.remote()
        except TimeoutError:
            raise ServiceError(
                f"{spec.name}: did not start within {START_SECONDS:g} s; its log: {spec.log_path}; where it has none, "
                f"its process did not start: see raylet.err in the logs of Ray's session"
            ) from None
        except RayTaskError as error:
            cause = causes(error.cause)
            raise ServiceError(f"{spec.name}: did not start: {cause}; its log: {spec.log_path}") from error
        except RayError as error:
            raise ServiceError(f"{spec.name}: died while starting: {error}; its log: {spec.log_path}") from error
        load.seconds = time.monotonic() - load.began
        started[spec.name] = Started(self._endpoints[spec.name], f"{host}:{port}")

    async def stop(self) -> None:
        """Stop each service, then kill its processes, then leave Ray."""
        joining, self._joining = self._joining, None
        if joining is None:
            return
        if not joining.done() and not self._starts_ray:  # nobody may be there
            joining.add_done_callback(_leave_late)
            return
        try:
            await asyncio.shield(asyncio.wrap_future(joining))
        except Exception:  # noqa: BLE001 - `start` has raised it
            return
        try:
            if ray.is_initialized():  # else the program has shut it down, and a call would start another
                await self._stop_actors()
        finally:
            await asyncio.to_thread(ray_session.leave)

    async def _stop_actors(self) -> None:
        actors, self._actors = self._actors, {}
        await asyncio.gather(*(_end(actor) for actor in actors.values()))
        for endpoint in self._endpoints.values():
            endpoint.close()
        ranks, self._ranks = self._ranks, {}
        for actor in (actor for group in ranks.values() for actor in group):
            ray.kill(actor)
        await asyncio.to_thread(self._pools.release)


def _leave_late(joined: Future[list[str]]) -> None:
    if joined.exception() is None:
        ray_session.leave()


def _limited(spec: ServiceSpec, **limits: int) -> ServiceSpec:
    return msgspec.structs.replace(spec, limits=msgspec.structs.replace(spec.limits, **limits))


def _shared_bytes(specs: Sequence[ServiceSpec]) -> int:
    """An equal part of half of Ray's store for the controller and each actor: coordinators, and ranks beside them."""
    ranks = [spec.topology.world_size for spec in specs]
    processes = 1 + len(ranks) + sum(n for n in ranks if n > 1)
    return int(ray.cluster_resources().get("object_store_memory", 0)) // 2 // processes


async def _end(actor: Any) -> None:
    # A service that is gone or stuck is killed all the same, below.
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await actor.stop.remote()
    ray.kill(actor)
