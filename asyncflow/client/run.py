"""Run: the handle with which a program follows and controls a running pipeline. The command line uses it too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncflow.client.channel import Channel, ChannelLink
from asyncflow.client.outside import Outside, OutsideLink
from protocols.control.events import CodeReloaded, Evaluated, Event, RunEnded, RunStarted, StepCommitted

if TYPE_CHECKING:  # the client of a remote run starts without numpy
    from protocols.control.delivery import ServiceStatistics


class Link(ChannelLink, OutsideLink, Protocol):
    """The connection to a run, in the same process or across a network."""

    def follow(self, cursor: int) -> AsyncGenerator[tuple[int, Event]]: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def checkpoint(self) -> str: ...
    async def reload(self) -> CodeReloaded: ...
    async def statistics(self) -> list[ServiceStatistics]: ...
    async def stop(self, *, abandon: bool) -> RunEnded: ...


class Run:
    """One run. `async for event in run.events()` follows it; the last event is RunEnded."""

    def __init__(self, link: Link, name: str, folder: Path, start: int = 0) -> None:
        """`start`: the cursor from which `events` begins by itself; the run's past before it can be read, too."""
        self.name = name
        self.folder = folder  # on the machine that the run is on
        self.cursor = start  # after the last event that was seen: where `events` goes on, also in another process
        self._link = link
        self._start = start
        self._steps: list[StepCommitted] = []
        self._evaluations: list[Evaluated] = []
        self._ended: RunEnded | None = None
        self._released: Awaitable[None] | None = None

    def __repr__(self) -> str:
        ended = self._ended.outcome if self._ended is not None else "not seen to end"
        return f"Run({self.name!r}, folder={str(self.folder)!r}, {ended})"

    async def events(self, cursor: int | None = None) -> AsyncIterator[Event]:
        """Yield all events from `cursor` on, up to and including RunEnded. Several followers are independent.

        Args:
            cursor: 0 is the run's first event ever; by default those since `launch` or `resume` started it here, and
                all events of a run elsewhere. A run that was stopped and resumed has a RunEnded and another RunStarted
                among its events.

        Raises BadInput for a cursor at which no event of this run ends.
        """
        async with aclosing(self.follow(cursor)) as items:
            async for _, event in items:
                yield event

    async def follow(self, cursor: int | None = None) -> AsyncGenerator[tuple[int, Event]]:
        """The events, as `events` yields them, each with the cursor after it. Waits have none of their own."""
        async with aclosing(self._link.follow(self._start if cursor is None else cursor)) as items:
            async for behind, event in items:
                if behind > self.cursor:
                    self.cursor = behind
                    self._note(event)
                yield behind, event

    async def wait(self) -> RunEnded:
        """Wait for the end of the run, and of a run that was awaited for its processes as well."""
        ended = await self.outcome()
        await self._release()
        return ended

    async def outcome(self) -> RunEnded:
        """Wait for the last step or the stop of the run. Returns at once if it was seen before."""
        if self._ended is None:
            async for event in self.events(self.cursor):
                if isinstance(event, RunEnded):
                    self._ended = event
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

    async def drain(self) -> RunEnded:
        """`stop()`: finish the step that is training, write a checkpoint, end."""
        return await self.stop()

    async def cancel(self) -> RunEnded:
        """`stop(abandon=True)`: give up the step that is training, save the last finished one, end."""
        return await self.stop(abandon=True)

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
            case RunStarted():  # a resumed run makes the steps after its checkpoint again
                self._steps = [step for step in self._steps if step.step <= event.first_step]
                self._evaluations = [point for point in self._evaluations if point.step <= event.first_step]
                self._ended = None
            case StepCommitted():
                self._steps.append(event)
            case Evaluated():
                self._evaluations.append(event)
            case RunEnded():
                self._ended = event
            case _:
                pass
