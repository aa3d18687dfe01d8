"""Run: the handle with which a program follows and controls a running pipeline. The command line uses it too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from asyncflow.client.channel import Channel
from asyncflow.client.outside import Outside
from asyncflow.control.controller import Controller
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import BadInput
from asyncflow.recipe.service_specs import channel_named
from asyncflow.services.channels.endpoint import Payload, ServiceGone, Store
from asyncflow.services.channels.subscriptions import follow
from asyncflow.services.runtime import Started
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, Evaluated, Event, RunEnded, StepCommitted
from protocols.control.requests import Reply, Request
from protocols.data.messages import Metrics
from workers.user_code import BadCode


class CurrentService:
    """A service or its current replacement, as long as the run has services. Implements `Requestable`."""

    def __init__(self, name: str, services: Mapping[str, Started]) -> None:
        """`services` holds the current endpoint of each service; it is empty once the run's services are stopped."""
        self.name = name
        self._services = services

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        started = self._services.get(self.name)
        if started is None:  # a request to a dead actor would make Ray start again
            raise ServiceGone(f"{self.name}: its run is over")
        return await started.endpoint.request(request, payloads)


class Run:
    """One run. `async for event in run.events()` follows it; the last event is RunEnded."""

    def __init__(
        self,
        folder: Path,
        controller: Controller,
        task: asyncio.Task[RunEnded],
        checked: Checked,
        services: Mapping[str, Started],
        store: Store,
    ) -> None:
        """`task` runs the controller; `services` are those of `CurrentService`."""
        self.folder = folder
        self._controller, self._task, self._checked = controller, task, checked
        self._services, self._store = services, store
        self._steps: list[StepCommitted] = []
        self._evaluations: list[Evaluated] = []
        self._ended: RunEnded | None = None
        self._seen = 0

    async def events(self, cursor: int = 0) -> AsyncIterator[Event]:
        """Yield all events from `cursor` on, up to and including RunEnded. Several followers are independent."""
        async for behind, event in self._controller.events.follow(cursor):
            if behind > self._seen:
                self._seen = behind
                self._note(event)
            yield event

    async def wait(self) -> RunEnded:
        """Wait for the end of the run. Returns at once if it was seen before."""
        if self._ended is None:
            async for event in self.events(self._seen):
                if isinstance(event, RunEnded):
                    return event
        assert self._ended is not None, "the events of a run end with RunEnded"
        return self._ended

    @property
    def metrics(self) -> list[StepCommitted]:
        """The committed steps that `events` or `wait` has seen. All of them are in metrics.jsonl."""
        return list(self._steps)

    @property
    def evaluations(self) -> list[Evaluated]:
        """The held-out evaluations seen so far."""
        return list(self._evaluations)

    async def pause(self) -> None:
        """Stop admitting prompts, generating and closing batches. Rows in flight stay where they are."""
        await self._controller.pause()

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._controller.resume()

    async def checkpoint(self) -> Path:
        """Write a checkpoint at the next boundary between steps, also while paused; returns its folder."""
        return Path(await self._controller.checkpoint())

    async def reload(self) -> CodeReloaded:
        """Load the changed files of the user's own losses, rewards and algorithm at the next boundary between steps.

        From then on rows are scored and batches closed with the new code; nothing in flight is lost. Raises BadInput,
        with the error, for a file that can't be used; then no file changes.
        """
        try:
            return await self._controller.reload()
        except BadCode as error:
            raise BadInput(f"reload: {error}") from error

    async def statistics(self) -> list[ServiceStatistics]:
        """The statistics of every service: rows, bytes by rank, refused duplicates, and who waits on whom."""
        return await self._controller.statistics()

    async def stop(self) -> RunEnded:
        """Drain, write a checkpoint and stop, within the recipe's deadline. The run can be resumed."""
        self._controller.stop()
        self._ended = ended = await asyncio.shield(self._task)
        return ended

    def channel(self, name: str) -> Channel:
        """The output of a stage, by its name ("policy.generate#1"), or by a message that only it sends ("rollouts").

        Raises BadInput, with the known names, for an unknown name or a message that several stages send.
        """
        service, stage = channel_named(self._checked.recipe, self._checked.dataflow, name)
        assert not issubclass(stage.produces, Metrics), f"{stage.name} sends no rows"
        current = CurrentService(service, self._services)
        return Channel(name, partial(follow, current, self._store, stage.name, stage.produces, self._task.done))

    def outside(self, role: str) -> Outside:
        """A worker of a role that the recipe makes external: `models.reward = { outside = true }`.

        Raises BadInput for a role that is not external.
        """
        outside = [name for name, model in self._checked.recipe.models.items() if model.outside]
        if role not in outside:
            raise BadInput(f"outside {role!r}: no such outside role; of this run: {', '.join(outside) or 'none'}")
        return Outside(role, CurrentService(role, self._services), self._store, self._task.done)

    def _note(self, event: Event) -> None:
        match event:
            case StepCommitted():
                self._steps.append(event)
            case Evaluated():
                self._evaluations.append(event)
            case RunEnded():
                self._ended = event
