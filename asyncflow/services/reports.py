"""What a service tells its controller: who waits for what, where its time went, and what happened, in order.

The controller fetches it all by one long call; a service whose controller has gone may not gather it for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping

from asyncflow.observe.exporter import Exporter
from protocols.control.notices import Busy, Notice, Span, Waiting

MOST_NOTICES = 10_000  # a controller that reads nothing for this long has gone


class Reports:
    """One service's."""

    def __init__(self, service: str, exporter: Exporter) -> None:
        self.waits: dict[str, Waiting] = {}  # by who waits
        self._service, self._exporter = service, exporter
        self._measured: dict[str, float] = {}
        self._notices: deque[Notice] = deque()
        self._noticed = asyncio.Event()

    def wait(self, who: str, what: str = "", on: str = "", since: float | None = None) -> None:
        """Somebody waits from now on, or no longer."""
        waiting = Waiting(who, what, on, time.time() if since is None else since)
        if what:
            self.waits[who] = waiting
        else:
            self.waits.pop(who, None)
        self.notify(waiting)

    def spent(self, activity: str, start: float, end: float, rows: int = 0, step: int = -1) -> None:
        """Account for time that was worked, in seconds of time.time()."""
        self._exporter.inc("busy_seconds_total", end - start, activity=activity)
        self.notify(Busy([Span(self._service, activity, start, end, rows, step)]))

    def measure(self, values: Mapping[str, float]) -> None:
        """Keep what was measured beside a step's own work: the next step's metrics tell the newest of it."""
        self._measured |= values

    def take_measured(self) -> dict[str, float]:
        """What was measured since this was last asked."""
        taken, self._measured = self._measured, {}
        return taken

    def notify(self, notice: Notice) -> None:
        """Queue something for the controller."""
        if len(self._notices) >= MOST_NOTICES:
            raise RuntimeError(f"service {self._service}: {MOST_NOTICES} notices that no controller has read")
        self._notices.append(notice)
        self._noticed.set()

    async def notices(self) -> list[Notice]:
        """All queued notices; waits until there is one."""
        await self._noticed.wait()
        self._noticed.clear()
        taken = list(self._notices)
        self._notices.clear()
        return taken
