"""The services that generate: all of them have the same weights and pause together, also after one was replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.services.channels.endpoint import Endpoint, ask
from asyncflow.services.weight_sync import PublicationFailed, Snapshot, install, publish
from protocols.control.events import Published
from protocols.control.requests import SetPaused
from protocols.weights import Version


class Generators:
    """The generators of one run by name, and what a successor among them has to be given."""

    def __init__(
        self, names: Sequence[str], supervisor: ServiceSupervisor, run_store: RunStore, publish_deadline_seconds: float
    ) -> None:
        self.names = names
        self._sinks = [name for name in names if name != "policy"]  # of weights: the policy has its own
        self._supervisor, self._run_store, self._deadline = supervisor, run_store, publish_deadline_seconds
        self._paused = False
        self._newest: Snapshot | None = None  # the newest weights that all sinks have

    async def set_paused(self, paused: bool) -> None:
        """Have all of them stop generating, or continue."""
        self._paused = paused
        for name in self.names:
            await self._supervisor.tell(name, SetPaused(paused))

    async def publish(self, step: int) -> Published | None:
        """Have all of them load the policy's weights of a step; None if the policy itself generates."""
        if not self._sinks:
            return None
        await self._supervisor.wait_healthy()  # a starting successor has a deadline of its own
        sinks = [self._supervisor.with_retry(name) for name in self._sinks]
        version = Version(self._run_store.term, step)
        published, self._newest = await publish(self._supervisor["policy"], sinks, version, self._deadline)
        self._run_store.log.emit(published)
        return published

    async def prepare(self, successor: Endpoint) -> None:
        """Give the successor of a dead generator the state that the others have.

        Raises PublicationFailed if it does not load the weights in time.
        """
        await ask(successor, SetPaused(self._paused))
        if self._newest is None:
            return
        try:
            async with asyncio.timeout(self._deadline):
                await install(successor, self._newest)
        except TimeoutError:
            raise PublicationFailed(
                f"version {self._newest.manifest.version}: {successor.name}, which was replaced, has not loaded it "
                f"within {self._deadline:g} s"
            ) from None
