"""Connects a client to a run whose controller is in the same process: requests become direct calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence

from asyncflow.control.controller import Controller
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import BadInput
from asyncflow.recipe.service_specs import channel_named
from asyncflow.services.channels.endpoint import Payload, ServiceError, ServiceGone, Store, ask
from asyncflow.services.channels.shard_refs import pack
from asyncflow.services.channels.subscriptions import follow
from asyncflow.services.external_workers import take_rows
from asyncflow.services.runtime import Started
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, Event, RunEnded
from protocols.control.replies import Reply, RowsPut
from protocols.control.requests import PutRows, Request
from protocols.data.columns import Batch
from protocols.data.messages import Metrics
from protocols.stage import Failure
from workers.user_code import BadCode


class CurrentService:
    """A service or its current replacement, as long as the run has services. Implements `Requestable`."""

    def __init__(self, name: str, services: Mapping[str, Started]) -> None:
        """`services` holds the current endpoint of each service; it is emptied before the runtime stops them."""
        self.name = name
        self._services = services

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        current = self._services.get(self.name)
        if current is None:  # a request to a dead actor would make Ray start again
            raise ServiceGone(f"{self.name}: its run is over")
        return await current.endpoint.request(request, payloads)


class LocalLink:
    """Implements `client.run.Link` for a controller in the same process."""

    def __init__(
        self,
        controller: Controller,
        task: asyncio.Task[RunEnded],
        checked: Checked,
        services: Mapping[str, Started],
        store: Store,
    ) -> None:
        self._controller, self._task, self._checked, self._store = controller, task, checked, store
        self._services = services
        self._loop, self._thread = asyncio.get_running_loop(), threading.current_thread().name

    def subscribe(self, channel: str) -> AsyncGenerator[tuple[Batch | None, int]]:
        self._check_loop()
        service, stage = channel_named(self._checked.recipe, self._checked.dataflow, channel)
        assert not issubclass(stage.produces, Metrics), f"{stage.name} sends no rows"
        return follow(CurrentService(service, self._services), self._store, stage.name, stage.produces, self._task.done)

    def take(self, role: str, most: int) -> AsyncGenerator[Batch]:
        return take_rows(self._external(role), self._store, most, self._task.done)

    async def put(self, role: str, answers: Batch | None, failures: Sequence[Failure], seconds: float) -> RowsPut:
        service = self._external(role)
        try:
            parts = [await asyncio.to_thread(pack, self._store, answers, 0)] if answers is not None else []
            request = PutRows([part.shard for part in parts], list(failures), seconds=seconds)
            reply, _ = await ask(service, request, [part.payload for part in parts])
        except ServiceGone:
            raise
        except (ServiceError, ValueError) as error:  # the service refused, or the batch is invalid
            raise BadInput(f"outside {role}: {error}") from error
        assert isinstance(reply, RowsPut)
        return reply

    def _external(self, role: str) -> CurrentService:
        self._check_loop()
        external = [name for name, model in self._checked.recipe.models.items() if model.outside]
        if role not in external:
            raise BadInput(f"outside {role!r}: no such external role; of this run: {', '.join(external) or 'none'}")
        return CurrentService(role, self._services)

    def follow(self, cursor: int) -> AsyncGenerator[tuple[int, Event]]:
        self._check_loop()
        return self._controller.events.follow(cursor)

    async def pause(self) -> None:
        self._check_running("pause")
        await self._controller.pause()

    async def resume(self) -> None:
        self._check_running("resume")
        await self._controller.resume()

    async def checkpoint(self) -> str:
        self._check_running("checkpoint")
        return await self._controller.checkpoint()

    async def reload(self) -> CodeReloaded:
        self._check_running("reload")
        try:
            return await self._controller.reload()
        except BadCode as error:
            raise BadInput(f"reload: {error}") from error

    async def statistics(self) -> list[ServiceStatistics]:
        self._check_running("statistics")
        return await self._controller.statistics()

    async def stop(self, *, abandon: bool) -> RunEnded:
        self._check_loop()
        self._controller.stop(abandon=abandon)
        return await asyncio.shield(self._task)

    def _check_running(self, call: str) -> None:
        """Raise RunFailed where the run is over: nobody is left to do what the call asks for."""
        self._check_loop()
        if self._task.done():
            raise RunFailed(f"{call}: the run is over; asyncflow.resume goes on from its last checkpoint")

    def _check_loop(self) -> None:
        """Raise RuntimeError in another event loop than the run's, whose state no other thread may touch."""
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"this run belongs to the event loop that started it, in thread {self._thread!r}; from another thread "
                f"call asyncio.run_coroutine_threadsafe(run.stop(), loop), with that loop"
            )
