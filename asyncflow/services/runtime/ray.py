"""One async Ray actor per service. Frames above the inline limit go through Ray's object store.

A frame is put once by its producer; messages carry its reference inside a list, so that Ray hands the
reference on and only a consumer that reads it maps the bytes. Ray's own envelope carries bytes and references,
nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from asyncflow.services.endpoint import Endpoint, Frame, Payload, ServiceError, all_or_error
from asyncflow.services.runtime import Started
from asyncflow.services.service import ModelService
from asyncflow.services.spec import ServiceSpec
from protocols.control import Delivery, Notice, Reply, Request

START_SECONDS = 300.0
STOP_SECONDS = 10.0
CONCURRENT_CALLS = 1000  # deliveries waiting for credit are calls in flight


class RayStore:
    """Small frames inline as bytes, larger ones as a reference in a list."""

    def __init__(self, inline_bytes: int) -> None:
        self._inline_bytes = inline_bytes

    def put(self, frame: Frame) -> Payload:
        return frame.tobytes() if frame.nbytes <= self._inline_bytes else [ray.put(frame)]

    async def get(self, payload: Payload) -> Frame:
        if isinstance(payload, bytes):
            return np.frombuffer(payload, np.uint8)
        return await payload[0]


class RayEndpoint:
    """A service in another process."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor

    async def deliver(self, delivery: Delivery, payload: Payload | None) -> None:
        await self._call("deliver", msgspec.msgpack.encode(delivery), payload)

    async def request(self, request: Request, payload: Payload | None = None) -> tuple[Reply, Payload | None]:
        reply, answer = await self._call("request", msgspec.msgpack.encode(request), payload)
        return msgspec.msgpack.decode(reply, type=Reply), answer

    async def notices(self) -> list[Notice]:
        return msgspec.msgpack.decode(await self._call("notices"), type=list[Notice])

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self.actor, method).remote(*arguments)
        except RayTaskError as error:
            raise ServiceError(f"{self.name}: {method}: {error.cause}") from error
        except RayError as error:
            raise ServiceError(
                f"{self.name}: {method}: its process is gone ({type(error).__name__}: {error})"
            ) from error


class ServiceActor:
    """The Ray actor around a ModelService: bytes in, bytes out."""

    def __init__(self, spec: bytes) -> None:
        self._spec = msgspec.msgpack.decode(spec, type=ServiceSpec)
        _log_to(self._spec.log_path)
        self._service = ModelService(self._spec, RayStore(self._spec.inline_bytes))

    async def start(self) -> tuple[str, int]:
        """(address, port) of the metrics endpoint"""
        host = ray.util.get_node_ip_address() if self._spec.metrics_host == "node" else self._spec.metrics_host
        return host, await self._service.start(host)

    async def connect(self, actors: Mapping[str, Any]) -> None:
        peers: dict[str, Endpoint] = {name: RayEndpoint(name, actor) for name, actor in actors.items()}
        self._service.connect({**peers, self._spec.name: self._service})

    async def deliver(self, delivery: bytes, payload: Payload | None) -> None:
        await self._service.deliver(msgspec.msgpack.decode(delivery, type=Delivery), payload)

    async def request(self, request: bytes, payload: Payload | None) -> tuple[bytes, Payload | None]:
        reply, answer = await self._service.request(msgspec.msgpack.decode(request, type=Request), payload)
        return msgspec.msgpack.encode(reply), answer

    async def notices(self) -> bytes:
        return msgspec.msgpack.encode(await self._service.notices())

    async def stop(self) -> None:
        await self._service.stop()


class RayRuntime:
    """Implements `Runtime`. Starts a Ray of its own where none is running, and then ends it too."""

    def __init__(self, inline_bytes: int, address: str = "", cpus: int | None = None) -> None:
        self.store = RayStore(inline_bytes)
        self._address = address
        self._cpus = cpus
        self._actors: dict[str, Any] = {}
        self._owns_ray = False

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Start all actors side by side, wait until each has its model, connect them."""
        try:
            await asyncio.to_thread(self._init)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            where = f"at {self._address}" if self._address else "on this machine"
            raise ServiceError(f"Ray {where} can't be used: {type(error).__name__}: {error}") from error
        kind: Any = ray.remote(ServiceActor)
        for spec in specs:
            self._actors[spec.name] = kind.options(
                name=f"{spec.run}/{spec.name}", num_cpus=0, max_restarts=0, max_concurrency=CONCURRENT_CALLS
            ).remote(msgspec.msgpack.encode(spec))
        started: dict[str, Started] = {}
        async with all_or_error() as group:
            for spec in specs:
                group.create_task(self._await_start(spec, started), name=f"start {spec.name}")
        await asyncio.gather(*(a.connect.remote(self._actors) for a in self._actors.values()))
        return started

    async def _await_start(self, spec: ServiceSpec, started: dict[str, Started]) -> None:
        actor = self._actors[spec.name]
        try:
            async with asyncio.timeout(START_SECONDS):
                host, port = await actor.start.remote()
        except TimeoutError:
            raise ServiceError(
                f"{spec.name}: did not start within {START_SECONDS:g} s; its log: {spec.log_path}"
            ) from None
        except RayTaskError as error:
            raise ServiceError(f"{spec.name}: did not start: {error.cause}; its log: {spec.log_path}") from error
        except RayError as error:
            raise ServiceError(f"{spec.name}: died while starting: {error}; its log: {spec.log_path}") from error
        started[spec.name] = Started(RayEndpoint(spec.name, actor), f"{host}:{port}")

    async def stop(self) -> None:
        """Let each service free what it holds, then end its process, then Ray if it is ours."""
        actors, self._actors = self._actors, {}
        await asyncio.gather(*(_end(actor) for actor in actors.values()))
        if self._owns_ray:
            self._owns_ray = False
            await asyncio.to_thread(ray.shutdown)

    def _init(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._owns_ray = not self._address
        project = str(Path(__file__).parents[3])
        ray.init(
            address=self._address or "local",
            num_cpus=None if self._address else self._cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "env_vars": {
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])]),
                }
            },
        )


async def _end(actor: Any) -> None:
    # A service that is gone or stuck is ended all the same, one line below.
    with contextlib.suppress(RayError, TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await actor.stop.remote()
    ray.kill(actor)


def _log_to(path: str) -> None:
    """Send this process's output to the service's own log file."""
    if path:
        log = Path(path).open("a", buffering=1)  # noqa: SIM115 - it is open for as long as the process lives
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = log, log
