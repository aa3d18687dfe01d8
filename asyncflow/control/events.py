"""A run's events in order, read with a cursor: a follower that comes late or reconnects misses no event."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec

from asyncflow.observe.event_file import EventFile, Recorded, read_events
from protocols.control.errors import BadInput
from protocols.control.events import Event, RunEnded, WaitsChanged

RECENT_EVENTS = 1024  # held in memory; older ones are read from the file


class Notifier:
    """Wakes every task that waits for a state to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake the waiting tasks."""
        self._event.set()
        self._event = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next `notify`."""
        await self._event.wait()


class _Recent(NamedTuple):
    start: int  # the cursor before it
    end: int
    event: Event


class EventLog:
    """Append-only, in the run folder's events.jsonl, whose offsets are the cursors (`asyncflow.observe.event_file`).

    Events that the disk refuses stay in memory, in their order, so that the run's followers see why it ends. Waits have
    no cursor: a follower gets the last ones, each at most once.
    """

    def __init__(self, file: EventFile) -> None:
        self.start = file.end  # the cursor of this start of the run; what is before it is the run's past
        self.end = file.end  # the cursor after the last event
        self._file = file
        self._recent: list[_Recent] = []
        self._refused = False
        self._waits: tuple[int, WaitsChanged | None] = (0, None)  # how many there were, and the last
        self._over = False
        self._added = Notifier()

    def add(self, event: Event) -> None:
        """Append, and wake the followers. After RunEnded nothing is appended: the followers have left."""
        if self._over:
            return
        if isinstance(event, WaitsChanged):
            self._waits = self._waits[0] + 1, event
            self._file.show_waits(event)
        else:
            end = self._append(event)
            self._recent.append(_Recent(self.end, end, event))
            self.end = end
            if not self._refused:
                del self._recent[:-RECENT_EVENTS]
        if isinstance(event, RunEnded):
            self._over = True
            self._file.close()
        self._added.notify()

    def _append(self, event: Event) -> int:
        if not self._refused:
            try:
                return self._file.append(event)
            except OSError:  # an event that matters is also written elsewhere, where a full disk ends the run
                self._refused = True
        return self.end + 1

    async def follow(self, cursor: int) -> AsyncGenerator[tuple[int, Event]]:
        """(cursor after it, event) from `cursor` on, up to and including the RunEnded of this start of the run.

        Raises BadInput for a cursor that no event ends at.
        """
        shown = 0
        while True:
            for recent in await self._from(cursor):
                cursor = recent.end
                yield cursor, recent.event
            number, waits = self._waits
            if cursor < self.end:  # there are more in the file, or some came meanwhile
                continue
            if self._over:
                return
            if waits is not None and number > shown:
                shown = number
                yield cursor, waits
            else:
                await self._added.changed()

    async def _from(self, cursor: int) -> list[_Recent]:
        """The next events; none at the end."""
        oldest = self._recent[0].start if self._recent else self.end
        if oldest <= cursor <= self.end:
            first = bisect.bisect_left(self._recent, cursor, key=lambda recent: recent.start)
            found = self._recent[first:]
            if (found[0].start if found else self.end) != cursor:
                raise BadInput(
                    f"cursor {cursor} is none of this run: start from 0, or from one that an event came with"
                )
            return found
        try:
            lines = await asyncio.to_thread(read_events, self._file.path.parent, cursor)
        except ValueError as error:
            raise BadInput(str(error)) from error
        starts = [cursor, *(line.cursor for line in lines)]
        return [
            _Recent(start, line.cursor, msgspec.json.decode(line.text, type=Recorded).event)
            for start, line in zip(starts, lines, strict=False)
        ]
