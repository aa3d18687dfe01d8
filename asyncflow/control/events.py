"""A run's events in order, read with a cursor: a follower that comes late or reconnects misses no stored event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from protocols.control.events import Event, RunEnded

MAX_EVENTS = 20_000


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


class EventLog:
    """Append-only; holds the newest `MAX_EVENTS` events."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._dropped = 0
        self._added = Notifier()

    @property
    def end(self) -> int:
        """The cursor after the last event."""
        return self._dropped + len(self._events)

    def add(self, event: Event) -> None:
        """Append, and wake the followers. After RunEnded nothing is appended: the followers have left."""
        if self._events and isinstance(self._events[-1], RunEnded):
            return
        self._events.append(event)
        if len(self._events) > MAX_EVENTS:
            del self._events[: len(self._events) - MAX_EVENTS]
            self._dropped += 1
        self._added.notify()

    async def follow(self, cursor: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """(cursor after it, event) from `cursor` on, up to and including RunEnded."""
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
            await self._added.changed()
