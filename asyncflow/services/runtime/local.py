"""All services in one process and one event loop: for tests, debugging and small machines.

Nothing is simulated: the same ModelService, codec and mailboxes, with the frame itself as its reference.
"""

from __future__ import annotations

import asyncio

from asyncflow.services.endpoint import Frame, Payload, ServiceError
from asyncflow.services.runtime import Started
from asyncflow.services.service import ModelService
from asyncflow.services.spec import ServiceSpec


class LocalStore:
    """Frames by value; read-only, since consumers share them."""

    def put(self, frame: Frame) -> Payload:
        frame.flags.writeable = False
        return frame

    async def get(self, payload: Payload) -> Frame:
        return payload


class LocalRuntime:
    """Implements `Runtime`."""

    def __init__(self) -> None:
        self.store = LocalStore()
        self._services: list[ModelService] = []

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Build the workers one after the other (they share the process), then connect."""
        started: dict[str, Started] = {}
        for spec in specs:
            service = ModelService(spec, self.store)
            self._services.append(service)
            try:
                started[spec.name] = Started(service, f"127.0.0.1:{await service.start()}")
            except Exception as error:
                raise ServiceError(f"{spec.name}: did not start: {type(error).__name__}: {error}") from error
        peers = {s.name: s for s in self._services}
        for service in self._services:
            service.connect(peers)
        return started

    async def stop(self) -> None:
        services, self._services = self._services, []
        await asyncio.gather(*(s.stop() for s in services))
