"""A discrete-event clock: coroutines sleep, wait for signals and share cores in virtual time.

Events at the same instant run in the order in which they became ready, so a simulation repeats exactly.

Why not SimPy: it has no equivalent of `Cores` (processor sharing with contention), which would have to be written on
top of it anyway. The rest (Clock, Signal, Lock) is about 110 lines and runs inside the inner loop of the placement
search.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from heapq import heappop, heappush
from math import ceil
from typing import Any

Work = Coroutine[Any, Any, None]


class Signal:
    """An event that coroutines wait for; `send` wakes the current waiters and leaves no trace for later ones."""

    __slots__ = ("_clock", "_waiting")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Work] = []

    def send(self) -> None:
        """Wake all current waiters."""
        if self._waiting:
            self._clock.ready.extend(self._waiting)
            self._waiting = []

    @types.coroutine
    def wait(self) -> Generator[Signal, None, None]:
        """Wait for the next `send`."""
        yield self

    def park(self, work: Work) -> None:
        """Called by the clock: add a waiting coroutine."""
        self._waiting.append(work)


class Clock:
    """Runs coroutines in virtual seconds. An exception in one of them ends the simulation and reaches the caller."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0  # resumed coroutines and fired timers: the cost of a simulation
        self.ready: deque[Work] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timed = 0

    def start(self, work: Work) -> None:
        """Start a coroutine."""
        self.ready.append(work)

    def at(self, time: float, what: Callable[[], None]) -> None:
        """Call `what` at a time; calls at the same time run in the order in which they were added."""
        self._timed += 1
        heappush(self._timers, (time, self._timed, what))

    @types.coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Wait for some virtual seconds."""
        if seconds > 0:
            yield float(seconds)

    async def all(self, works: Iterable[Work]) -> None:
        """Run coroutines concurrently and wait for all of them."""
        left, done = 0, Signal(self)

        async def counted(work: Work) -> None:
            nonlocal left
            await work
            left -= 1
            if not left:
                done.send()

        for work in works:
            left += 1
            self.start(counted(work))
        if left:
            await done.wait()

    def run(self, over: Callable[[], bool]) -> None:
        """Run events until `over` is true or no event is left."""
        while not over():
            if self.ready:
                self._resume(self.ready.popleft())
            elif self._timers:
                self.events += 1
                self.now, _, what = heappop(self._timers)
                what()
            else:
                return

    def close(self) -> None:
        """Close the coroutines that are ready and drop all timers."""
        while self.ready:
            self.ready.popleft().close()
        self._timers.clear()

    def _resume(self, work: Work) -> None:
        self.events += 1
        try:
            wanted = work.send(None)
        except StopIteration:
            return
        if isinstance(wanted, Signal):
            wanted.park(work)
        else:
            self.at(self.now + wanted, lambda: self.ready.append(work))


class Lock:
    """A mutex, first come first served: the compute thread of a service."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._held = False
        self._queue: deque[Signal] = deque()

    async def __aenter__(self) -> None:
        if self._held:
            turn = Signal(self._clock)
            self._queue.append(turn)
            await turn.wait()
        self._held = True

    async def __aexit__(self, *error: object) -> None:
        if self._queue:
            self._queue.popleft().send()  # the lock passes on while held, so no newcomer can take it
        else:
            self._held = False


class Cores:
    """Processor sharing: n jobs on c cores each advance at min(1, c/n) of full speed.

    `count` 0 means no limit. Jobs that take turns on a core find cold caches: `crowded` is the number of cores' work
    done at once while there are more jobs than cores; 0 means no loss.
    """

    def __init__(self, clock: Clock, count: float, crowded: float = 0.0) -> None:
        self._clock, self._count, self._crowded = clock, count, crowded or count
        self._progress = 0.0  # seconds that a job running since the start would have advanced
        self._since = 0.0
        self._running: list[tuple[float, int, Signal]] = []  # by the progress at which they end
        self._started = 0
        self._alarm = 0

    async def work(self, seconds: float) -> None:
        """Do `seconds` of work; it takes longer while other jobs use the cores."""
        if not self._count or seconds <= 0:
            await self._clock.sleep(seconds)
            return
        self._advance()
        self._started += 1
        done = Signal(self._clock)
        heappush(self._running, (self._progress + seconds, self._started, done))
        self._set_alarm()
        await done.wait()

    @property
    def _rate(self) -> float:
        running = len(self._running)
        return min(1.0, (self._count if running <= ceil(self._count) else self._crowded) / running) if running else 1.0

    def _advance(self) -> None:
        self._progress += (self._clock.now - self._since) * self._rate
        self._since = self._clock.now

    def _set_alarm(self) -> None:
        """Set the alarm for the next job to end. An earlier alarm is void, because the rate has changed."""
        self._alarm += 1
        if not self._running:
            return
        alarm, (end, _, _) = self._alarm, self._running[0]
        self._clock.at(self._clock.now + max(0.0, end - self._progress) / self._rate, lambda: self._ring(alarm))

    def _ring(self, alarm: int) -> None:
        if alarm != self._alarm:
            return
        self._advance()
        self._progress = max(self._progress, self._running[0][0])  # rounding must not leave a remainder
        while self._running and self._running[0][0] <= self._progress:
            heappop(self._running)[2].send()
        self._set_alarm()
