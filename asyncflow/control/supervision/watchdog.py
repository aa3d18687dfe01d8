"""The one who looks at a run every half second: the live view's figures, and the wait-for graph of a stall."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncflow.control.events import EventLog
from asyncflow.control.settings import Deadlines
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from protocols.control.events import Event, Stalled, WaitsChanged


class Watchdog:
    """What it saw last, and whether it has barked."""

    def __init__(
        self, fleet: ServiceSupervisor, deadlines: Deadlines, events: EventLog, emit: Callable[[Event], None]
    ) -> None:
        self._fleet, self._deadlines, self._events, self._emit = fleet, deadlines, events, emit
        self._tokens, self._at = 0, time.monotonic()
        self._told = False

    def check(self, *, live_prompts: int, step_progress: float, tokens: int, paused: bool) -> None:
        """Tell the followers what goes on; once a stall, its graph. RunFailed where it has lasted too long.

        Args:
            step_progress: share of the current batch's prompts that are settled, 0 to 1.
            tokens: generated since the run started.
            paused: nothing is meant to move.
        """
        now = time.monotonic()
        rate, self._tokens, self._at = (tokens - self._tokens) / (now - self._at), tokens, now
        waits = self._fleet.waits.current()
        self._events.add(
            WaitsChanged(waits=waits, live_prompts=live_prompts, step_progress=step_progress, tokens_per_second=rate)
        )
        idle = self._fleet.idle_seconds
        if paused or idle < self._deadlines.stall:
            self._told = False
            return
        graph = self._fleet.graph()
        if idle > self._deadlines.give_up:
            raise RunFailed(f"nothing moved for {idle:.0f} s:\n  " + "\n  ".join(graph))
        if not self._told:
            self._told = True
            self._emit(Stalled(seconds=idle, graph=graph))
