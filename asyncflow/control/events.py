"""A run's events in order, with a cursor: who comes late or comes back misses nothing that is still kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from protocols.control.events import Event, RunEnded

KEPT = 20_000


class Notifier:
    """Wakes everybody who waits for some state to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next beat."""
        await self._event.wait()


class EventLog:
    """Append-only; the oldest events fall off after `KEPT`."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._dropped = 0
        self._pulse = Notifier()

    @property
    def end(self) -> int:
        """The cursor behind the last event."""
        return self._dropped + len(self._events)

    def add(self, event: Event) -> None:
        """Append, and wake the followers. Behind RunEnded nothing is appended: followers have gone by then."""
        if self._events and isinstance(self._events[-1], RunEnded):
            return
        self._events.append(event)
        if len(self._events) > KEPT:
            del self._events[: len(self._events) - KEPT]
            self._dropped += 1
        self._pulse.notify()

    async def follow(self, cursor: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """(cursor behind it, event), from `cursor` on, until and including RunEnded; behind it there is nothing."""
        while True:
            cursor = max(cursor, self._dropped)
            while cursor < self.end:
                event = self._events[cursor - self._dropped]
                cursor += 1
                yield cursor, event
                if isinstance(event, RunEnded):
                    return
            if self._events and isinstance(self._events[-1], RunEnded):
                return
            await self._pulse.changed()
