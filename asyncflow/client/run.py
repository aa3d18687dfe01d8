"""`Run`: a running pipeline in the hands of a program. The command line uses nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from asyncflow.client.channel import Channel, ChannelLink
from asyncflow.client.outside import Outside, OutsideLink
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, Evaluated, Event, RunEnded, StepCommitted


class Link(ChannelLink, OutsideLink, Protocol):
    """The way to a run: in the same process, or across a network."""

    def follow(self, cursor: int) -> AsyncIterator[tuple[int, Event]]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def checkpoint(self) -> str: ...
    async def reload(self) -> CodeReloaded: ...
    async def statistics(self) -> list[ServiceStatistics]: ...
    async def stop(self) -> RunEnded: ...


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

    async def events(self, cursor: int = 0) -> AsyncIterator[Event]:
        """All events from `cursor` on, until and including RunEnded. Several followers do not disturb each other."""
        async for behind, event in self._link.follow(cursor):
            if behind > self._seen:
                self._seen = behind
                self._note(event)
            yield event

    async def wait(self) -> RunEnded:
        """Follow the run to its end; how it ended, also if that was seen before."""
        if self._ended is None:
            async for event in self.events(self._seen):
                if isinstance(event, RunEnded):
                    return event
        assert self._ended is not None, "the events of a run end with RunEnded"
        return self._ended

    @property
    def metrics(self) -> list[StepCommitted]:
        """The committed steps that `events` or `wait` has seen; the whole record is metrics.jsonl."""
        return list(self._steps)

    @property
    def evaluations(self) -> list[Evaluated]:
        """The held-out evaluations seen so far."""
        return list(self._evaluations)

    async def pause(self) -> None:
        """Stop admitting, drawing and forming batches. Rows in flight keep their place."""
        await self._link.pause()

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._link.resume()

    async def checkpoint(self) -> Path:
        """Write a checkpoint at the next boundary between steps, also while paused; its folder."""
        return Path(await self._link.checkpoint())

    async def reload(self) -> CodeReloaded:
        """Take the changed files of the user's own losses, rewards and algorithm at the next boundary between steps.

        Rows that are scored and batches that are closed from then on are of the new code; nothing in flight is lost.
        Raises BadInput, with the error, for a file that can't be used: then all of them run on as they were.
        """
        return await self._link.reload()

    async def statistics(self) -> list[ServiceStatistics]:
        """What every service's channels did so far: rows, bytes by rank, duplicates refused, who waits on whom."""
        return await self._link.statistics()

    async def stop(self) -> RunEnded:
        """Drain, write a checkpoint and end, within the recipe's deadline. The run can be resumed."""
        self._ended = await self._link.stop()
        return self._ended

    def channel(self, name: str) -> Channel:
        """What a stage sends: by its name ("policy.generate#1"), or by a message's that it alone sends ("rollouts")."""
        return Channel(self._link, name)

    def outside(self, role: str) -> Outside:
        """Work on a role that the recipe keeps outside: `models.reward = { outside = true }`."""
        return Outside(self._link, role)

    def _note(self, event: Event) -> None:
        match event:
            case StepCommitted():
                self._steps.append(event)
            case Evaluated():
                self._evaluations.append(event)
            case RunEnded():
                self._ended = event
