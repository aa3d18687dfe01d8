"""Reports queues a service's notices for the controller: waits, working time and events, in order.

The controller fetches them with a long poll. The queue is bounded, since the controller of a service may be gone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping

from asyncflow.observe.exporter import Exporter
from protocols.control.notices import Busy, Notice, Span, Waiting

MOST_NOTICES = 10_000  # unread; with more the controller is considered gone


class Reports:
    """The notices of one service."""

    def __init__(self, service: str, exporter: Exporter) -> None:
        self.waits: dict[str, Waiting] = {}  # by the waiting stage
        self._service, self._exporter = service, exporter
        self._measured: dict[str, float] = {}
        self._notices: deque[Notice] = deque()
        self._noticed = asyncio.Event()
        self._closed = False

    def wait(self, who: str, what: str = "", on: str = "", since: float | None = None) -> None:
        """Report that `who` waits for `what` from now on; an empty `what`: it no longer waits."""
        before = self.waits.get(who)
        if since is None and before is not None and (before.what, before.on) == (what, on):
            return  # it has waited for that all along
        waiting = Waiting(who, what, on, time.time() if since is None else since)
        if what:
            self.waits[who] = waiting
        else:
            self.waits.pop(who, None)
        self.notify(waiting)

    def spent(self, activity: str, start: float, end: float, rows: int = 0, step: int = -1) -> None:
        """Account for working time, in seconds of time.time()."""
        self._exporter.inc("busy_seconds_total", end - start, activity=activity)
        self.notify(Busy([Span(self._service, activity, start, end, rows, step)]))

    def measure(self, values: Mapping[str, float]) -> None:
        """Keep metrics that belong to no step; the next step reports the newest value of each."""
        self._measured |= values

    def take_measured(self) -> dict[str, float]:
        """The metrics kept since the last call."""
        taken, self._measured = self._measured, {}
        return taken

    def notify(self, notice: Notice) -> None:
        """Queue a notice. Raises RuntimeError if the controller has stopped reading."""
        if self._closed:
            return
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

    def close(self) -> None:
        """The term is over: nobody reads what is still reported of it."""
        self._closed = True
        self._notices.clear()
