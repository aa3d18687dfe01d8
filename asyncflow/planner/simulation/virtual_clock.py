"""A simulation's clock: SimPy's environment for coroutines, with signals, and with cores that jobs share.

Events of the same instant are processed in the order in which they were triggered, so a simulation repeats exactly.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Generator, Iterable
from heapq import heappop, heappush
from math import ceil
from typing import Any

import simpy

Waiting = Generator[simpy.Event, Any, None]


@types.coroutine
def wait_for(event: simpy.Event) -> Waiting:
    """Wait for a SimPy event in a coroutine."""
    yield event


class Clock(simpy.Environment):
    """SimPy's environment, for coroutines. An exception in one of them ends the simulation and reaches the caller."""

    def start(self, work: Awaitable[None]) -> simpy.Process:
        """Start a coroutine, after the events that are due now: SimPy alone would start it before them."""

        async def started() -> None:
            await wait_for(self.timeout(0))
            await work

        return self.process(started().__await__())

    @types.coroutine
    def sleep(self, seconds: float) -> Waiting:
        """Wait for some virtual seconds."""
        if seconds > 0:
            yield self.timeout(seconds)

    async def all(self, works: Iterable[Awaitable[None]]) -> None:
        """Run these concurrently and wait for all of them."""
        await wait_for(self.all_of([self.start(work) for work in works]))


class Signal:
    """An event that coroutines wait for; `send` wakes the current waiters and leaves no trace for later ones."""

    __slots__ = ("_clock", "_next")

    def __init__(self, clock: Clock) -> None:
        self._clock, self._next = clock, clock.event()

    def send(self) -> None:
        """Wake all current waiters."""
        if self._next.callbacks:
            sent, self._next = self._next, self._clock.event()
            sent.succeed()

    @types.coroutine
    def wait(self) -> Waiting:
        """Wait for the next `send`."""
        yield self._next


class Cores:
    """Processor sharing: n jobs on c cores each advance at min(1, c/n) of full speed.

    `count` 0 means no limit. Jobs that take turns on a core find cold caches: `crowded` is the number of cores' work
    done at once while there are more jobs than cores; 0 means no loss.
    """

    def __init__(self, clock: Clock, count: float, crowded: float = 0.0) -> None:
        self._clock, self._count, self._crowded = clock, count, crowded or count
        self._progress = 0.0  # seconds that a job running since the start would have advanced
        self._since = 0.0
        self._running: list[tuple[float, int, simpy.Event]] = []  # by the progress at which they end
        self._started = 0
        self._alarm: simpy.Event | None = None

    async def work(self, seconds: float) -> None:
        """Do `seconds` of work; it takes longer while other jobs use the cores."""
        if not self._count or seconds <= 0:
            await self._clock.sleep(seconds)
            return
        self._advance()
        self._started += 1
        done = self._clock.event()
        heappush(self._running, (self._progress + seconds, self._started, done))
        self._set_alarm()
        await wait_for(done)

    @property
    def _rate(self) -> float:
        running = len(self._running)
        return min(1.0, (self._count if running <= ceil(self._count) else self._crowded) / running) if running else 1.0

    def _advance(self) -> None:
        self._progress += (self._clock.now - self._since) * self._rate
        self._since = self._clock.now

    def _set_alarm(self) -> None:
        """Set the alarm for the next job to end. An earlier alarm is void, because the rate has changed."""
        end = self._running[0][0]
        self._alarm = self._clock.timeout(max(0.0, end - self._progress) / self._rate)
        self._alarm.callbacks.append(self._ring)

    def _ring(self, alarm: simpy.Event) -> None:
        if alarm is not self._alarm:
            return
        self._advance()
        self._progress = max(self._progress, self._running[0][0])  # rounding must not leave a remainder
        while self._running and self._running[0][0] <= self._progress:
            heappop(self._running)[2].succeed()
        if self._running:
            self._set_alarm()
