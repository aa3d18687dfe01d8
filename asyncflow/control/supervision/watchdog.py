"""The watchdog checks a run twice a second: it reports progress, and the wait-for graph if nothing moves."""

from __future__ import annotations

import time
from collections.abc import Iterator

from asyncflow.control.settings import Deadlines
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from protocols.control.events import Event, Stalled, WaitsChanged


class Watchdog:
    """Remembers the last check, and whether the current stall was reported."""

    def __init__(self, supervisor: ServiceSupervisor, deadlines: Deadlines) -> None:
        self._supervisor, self._deadlines = supervisor, deadlines
        self._tokens, self._checked_at = 0, time.monotonic()
        self._reported = False
        self._waits: WaitsChanged | None = None  # the last that was reported

    def generated(self, tokens: int) -> None:
        """Count generated tokens."""
        self._tokens += tokens

    def check(self, *, live_prompts: int, step_progress: float, paused: bool) -> Iterator[Event]:
        """The events to report now: waits that changed, and once a stall its graph. RunFailed if it lasts too long.

        Args:
            step_progress: share of the current batch's prompts that are complete, 0 to 1.
            paused: nothing is meant to move.
        """
        now = time.monotonic()
        since, self._checked_at = self._checked_at, now
        rate, self._tokens = self._tokens / (now - since), 0
        for silent in self._supervisor.silences.elapse(now - since):
            yield silent
            if silent.ended:
                self._supervisor.mark_progress()  # what follows a death has deadlines of its own
        waits = self._supervisor.current_waits()
        now_waits = WaitsChanged(
            waits=waits, live_prompts=live_prompts, step_progress=step_progress, tokens_per_second=rate
        )
        if now_waits != self._waits:
            self._waits = now_waits
            yield now_waits
        idle = self._supervisor.idle_seconds
        if paused or idle < self._deadlines.stall:
            self._reported = False
            return
        graph = self._supervisor.graph() or ["no service waits for another: each is computing"]
        if idle > self._deadlines.give_up:
            allowed = f"deadlines.give_up = {self._deadlines.give_up:g}"
            raise RunFailed(f"nothing moved for {idle:.0f} s ({allowed}):\n  " + "\n  ".join(graph))
        if not self._reported:
            self._reported = True
            yield Stalled(seconds=idle, graph=graph)
