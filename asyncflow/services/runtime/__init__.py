"""Runtimes start and stop services: as Ray actors, or all in one process. Both give the same endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from asyncflow.services.channels.endpoint import Endpoint, Store
from asyncflow.services.ranks.spec import ServiceSpec

CPU_SLOT = "cpu-slot"  # the device of a machine without an accelerator
SLOTS_PER_CORE = 4  # slots time-share the cores, so there can be more slots than cores


class Started(msgspec.Struct):
    """A running service and its metrics address."""

    endpoint: Endpoint
    address: str  # host:port


class Load(msgspec.Struct):
    """The start of one service: its process, if it has its own, and its model."""

    began: float  # time.monotonic()
    seconds: float | None = None  # that it took; None: it is not ready


class Runtime(Protocol):
    """Starts, replaces and stops services."""

    loads: dict[str, Load]  # by service, the last start of each
    warnings: list[str]  # of the start, for the user

    @property
    def store(self) -> Store:
        """The store through which the controller reads frames."""
        ...

    async def start(self, specs: list[ServiceSpec]) -> dict[str, Started]:
        """Start and connect all services; returns them by name. Raises ServiceError naming one that did not start."""
        ...

    async def restart(self, names: Sequence[str], term: int) -> dict[str, Started]:
        """Replace services by new ones, which start in `term` and without state, and reconnect all; the new ones.

        Raises ServiceError naming one that did not start.
        """
        ...

    def kill(self, name: str) -> None:
        """Kill a service's processes at once, which are stopped or hang: its callers get ServiceGone."""
        ...

    async def stop(self) -> None:
        """Stop all services. Idempotent."""
        ...
