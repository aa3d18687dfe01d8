"""Run: the handle with which a program follows and controls a running pipeline. The command line uses it too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Protocol

from asyncflow.client.channel import Channel, ChannelLink
from asyncflow.client.outside import Outside, OutsideLink
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, Evaluated, Event, RunEnded, StepCommitted


class Link(ChannelLink, OutsideLink, Protocol):
    """The connection to a run, in the same process or across a network."""

    def follow(self, cursor: int) -> AsyncIterator[tuple[int, Event]]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def checkpoint(self) -> str: ...
    async def reload(self) -> CodeReloaded: ...
    async def statistics(self) -> list[ServiceStatistics]: ...
    async def stop(self, *, abandon: bool) -> RunEnded: ...


class Run:
    """One run. `async for event in run.events()` follows it; the last event is RunEnded."""

    def __init__(self, link: Link, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._link = link
        self._steps: list[StepCommitted] = []
        self._evaluations: list[Evaluated] = []
        self._ended: RunEnded | None = None
        self._seen = 0
        self._released: Awaitable[None] | None = None

    def __repr__(self) -> str:
        ended = self._ended.outcome if self._ended is not None else "not seen to end"
        return f"Run({self.name!r}, folder={str(self.folder)!r}, {ended})"

    async def events(self, cursor: int = 0) -> AsyncIterator[Event]:
        """Yield all events from `cursor` on, up to and including RunEnded. Several followers are independent."""
        async for behind, event in self._link.follow(cursor):
            if behind > self._seen:
                self._seen = behind
                self._note(event)
            yield event

    async def wait(self) -> RunEnded:
        """Wait for the end of the run, and of a run that was awaited for its processes as well."""
        ended = await self.outcome()
        await self._release()
        return ended

    async def outcome(self) -> RunEnded:
        """Wait for the last step or the stop of the run. Returns at once if it was seen before."""
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
        await self._link.pause()

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._link.resume()

    async def checkpoint(self) -> Path:
        """Write a checkpoint at the next boundary between steps, also while paused; returns its folder."""
        return Path(await self._link.checkpoint())

    async def reload(self) -> CodeReloaded:
        """Load the changed files of the user's own losses, rewards and algorithm at the next boundary between steps.

        From then on rows are scored and batches closed with the new code; nothing in flight is lost. Raises BadInput,
        with the error, for a file that can't be used; then no file changes.
        """
        return await self._link.reload()

    async def statistics(self) -> list[ServiceStatistics]:
        """The statistics of every service: rows, bytes by rank, refused duplicates, and who waits on whom."""
        return await self._link.statistics()

    async def stop(self, *, abandon: bool = False) -> RunEnded:
        """Drain, write a checkpoint and stop, within the recipe's deadline. The run can be resumed.

        `abandon`: do not wait for the step that is training, unless one of its models has finished it; a resume trains
        it again. May be called while another call drains.
        """
        self._ended = await self._link.stop(abandon=abandon)
        await self._release()
        return self._ended

    def released_by(self, release: Awaitable[None]) -> None:
        """What `wait` and `stop` wait for after the end: the processes and the folder's lock are free then."""
        self._released = release

    async def _release(self) -> None:
        if self._released is not None:
            await asyncio.shield(self._released)

    def channel(self, name: str) -> Channel:
        """The output of a stage, by its name ("policy.generate#1"), or by a message that only it sends ("rollouts")."""
        return Channel(self._link, name)

    def outside(self, role: str) -> Outside:
        """A worker of a role that the recipe makes external: `models.reward = { outside = true }`."""
        return Outside(self._link, role)

    def _note(self, event: Event) -> None:
        match event:
            case StepCommitted():
                self._steps.append(event)
            case Evaluated():
                self._evaluations.append(event)
            case RunEnded():
                self._ended = event
