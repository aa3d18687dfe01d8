"""The service that generates: its weights, its pauses, and what its successor is given when it was replaced."""

from __future__ import annotations

import asyncio

from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.services.channels.endpoint import Endpoint, ask
from asyncflow.services.weight_sync import PublicationFailed, Snapshot, install, publish
from protocols.control.events import Published
from protocols.control.requests import SetPaused
from protocols.weights import Version


class GeneratingService:
    """The generator of one run; it may be the policy itself."""

    def __init__(
        self, name: str, supervisor: ServiceSupervisor, run_store: RunStore, publish_deadline_seconds: float
    ) -> None:
        self.name = name
        self._supervisor, self._run_store, self._deadline = supervisor, run_store, publish_deadline_seconds
        self._paused = False
        self._newest: Snapshot | None = None  # the newest weights that it has loaded

    async def set_paused(self, paused: bool) -> None:
        """Have it stop generating, or continue."""
        self._paused = paused
        await self._supervisor.tell(self.name, SetPaused(paused))

    async def publish(self, step: int) -> Published | None:
        """Have it load the policy's weights of a step; None if it is the policy."""
        if self.name == "policy":
            return None
        await self._supervisor.wait_healthy()  # a starting successor has a deadline of its own
        replica = self._supervisor.with_retry(self.name)
        version = Version(self._run_store.term, step)
        published, self._newest = await publish(self._supervisor["policy"], [replica], version, self._deadline)
        self._run_store.log.emit(published)
        return published

    async def prepare(self, successor: Endpoint) -> None:
        """Give its successor the state that it had.

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
