"""Virtual time: coroutines that sleep, wait for signals and share cores, run as fast as they can be resumed.

Nothing here knows what is simulated. Work at the same instant is done in the order in which it became ready, so a
simulation repeats exactly.
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
    """Something that coroutines wait for; `send` wakes those that wait now, and nobody later."""

    __slots__ = ("_clock", "_waiting")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Work] = []

    def send(self) -> None:
        """Wake whoever waits."""
        if self._waiting:
            self._clock.ready.extend(self._waiting)
            self._waiting = []

    @types.coroutine
    def wait(self) -> Generator[Signal, None, None]:
        """Until the next `send`."""
        yield self

    def park(self, work: Work) -> None:
        """For the clock: this coroutine waits here."""
        self._waiting.append(work)


class Clock:
    """Runs coroutines over virtual seconds. An error in one of them ends the simulation and reaches its caller."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0  # coroutines resumed and timers gone off: what a simulation costs
        self.ready: deque[Work] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timed = 0

    def start(self, work: Work) -> None:
        """Run a coroutine from now on."""
        self.ready.append(work)

    def at(self, time: float, what: Callable[[], None]) -> None:
        """Call something at a time; of several at the same time the first given is called first."""
        self._timed += 1
        heappush(self._timers, (time, self._timed, what))

    @types.coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Let virtual time pass."""
        if seconds > 0:
            yield float(seconds)

    async def all(self, works: Iterable[Work]) -> None:
        """Run coroutines side by side until all are done."""
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
        """Let time pass until `over`, or until nothing is left to happen."""
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
        """Nothing happens any more: let go of what was about to."""
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
    """One holder at a time, first come first served: a service's compute thread."""

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
            self._queue.popleft().send()  # it is handed on held: nobody comes between
        else:
            self._held = False


class Cores:
    """Processor sharing: n pieces of work on c cores each advance at min(1, c/n) of full speed.

    `count` 0 stands for as many cores as there is work. Who takes turns finds caches cold: `crowded` is how much is
    done at once while there is more work than cores, 0 where that is no less.
    """

    def __init__(self, clock: Clock, count: float, crowded: float = 0.0) -> None:
        self._clock, self._count, self._crowded = clock, count, crowded or count
        self._progress = 0.0  # seconds that a piece of work present from the start has advanced
        self._since = 0.0
        self._running: list[tuple[float, int, Signal]] = []  # by the progress at which they end
        self._started = 0
        self._alarm = 0

    async def work(self, seconds: float) -> None:
        """Do so much work; it takes longer where others want the cores."""
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
        """For the next end; what was set before no longer counts, since the speed has changed."""
        self._alarm += 1
        if not self._running:
            return
        alarm, (end, _, _) = self._alarm, self._running[0]
        self._clock.at(self._clock.now + max(0.0, end - self._progress) / self._rate, lambda: self._ring(alarm))

    def _ring(self, alarm: int) -> None:
        if alarm != self._alarm:
            return
        self._advance()
        self._progress = max(self._progress, self._running[0][0])  # rounding must not leave a last moment over
        while self._running and self._running[0][0] <= self._progress:
            heappop(self._running)[2].send()
        self._set_alarm()
