"""Where services live: Ray actors, or all in one process. Both give the same endpoints."""

from __future__ import annotations

from typing import Protocol

import msgspec

from asyncflow.services.channels.endpoint import Endpoint, Store
from asyncflow.services.ranks.spec import ServiceSpec

CPU_SLOT = "cpu-slot"  # the device of machines without an accelerator
SLOTS_PER_CORE = 4  # slots share the cores by time, so there may be more of them


class Started(msgspec.Struct):
    """A running service and its metrics address."""

    endpoint: Endpoint
    address: str  # host:port


class Runtime(Protocol):
    """Starts services and ends them."""

    @property
    def store(self) -> Store:
        """The controller's own access to frames."""
        ...

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Start and connect all services; by name. Raises ServiceError naming the one that did not start."""
        ...

    async def restart(self, name: str) -> Started:
        """Replace a service by a new one of the same spec, with empty memory, and tell the others where it is."""
        ...

    async def stop(self) -> None:
        """End all of them. Idempotent."""
        ...
