"""LocalRuntime runs all services in one process and one event loop: for tests, debugging and small machines.

It uses the same ModelService, ranks, codec and mailboxes as the Ray runtime; a payload is the frame itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.ranks.rank import LocalRanks
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.runtime import Load, Started
from asyncflow.services.runtime.local_store import DEFAULT_BUDGET, LocalStore
from asyncflow.services.service import ModelService


class LocalRuntime:
    """Implements `Runtime`."""

    def __init__(self, store_bytes: int = 0) -> None:
        """`store_bytes`: memory for the rows in flight, 0 for a gigabyte; frames beyond it are written to files."""
        self.store = LocalStore(store_bytes or DEFAULT_BUDGET)
        self.warnings: list[str] = []
        self.loads: dict[str, Load] = {}
        self._services: dict[str, ModelService] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Build the workers one after the other, since they share the process, then connect the services."""
        started = {spec.name: await self._start(spec) for spec in specs}
        for service in self._services.values():
            service.connect(self._services)
        return started

    async def restart(self, names: Sequence[str], term: int) -> dict[str, Started]:
        """Stop services at once, as the death of their processes would, and start others in their place."""
        gone = [self._services[name] for name in names]
        for service in gone:
            await service.stop()
        started = {s.name: await self._start(msgspec.structs.replace(s.spec, term=term)) for s in gone}
        for service in self._services.values():
            service.connect(self._services)
        return started

    def kill(self, name: str) -> None:
        """End a service: its callers get ServiceGone. One that hangs in this process hangs with the caller."""
        self._ending.add(ending := asyncio.create_task(self._services[name].stop(), name=f"end of {name}"))
        ending.add_done_callback(self._ending.discard)

    async def _start(self, spec: ServiceSpec) -> Started:
        several = spec.topology.world_size > 1
        service = ModelService(spec, self.store, LocalRanks(spec, self.store) if several else None)
        self._services[spec.name] = service
        load = self.loads[spec.name] = Load(time.monotonic())
        try:
            port = await service.start()
        except Exception as error:
            raise ServiceError(f"{spec.name}: did not start: {type(error).__name__}: {error}") from error
        load.seconds = time.monotonic() - load.began
        return Started(service, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        services, self._services = self._services, {}
        await asyncio.gather(*(s.stop() for s in services.values()))
        self.store.close()
