"""What each further signal does to a run: drain, give the step up, end at once. Pure.

    before the start   cancel it; wait; exit
    afterwards         drain; abandon the step; cancel; wait

Some programs send a signal twice, and terminals and service managers send it to all processes of a run: so no signal
but the third costs anything that a step has committed.
"""

from __future__ import annotations

import signal
from typing import Literal

Action = Literal["cancel", "drain", "abandon", "wait", "exit"]

_BEFORE: tuple[Action, ...] = ("cancel", "wait", "exit")
_RUNNING: tuple[Action, ...] = ("drain", "abandon", "cancel", "wait")

SENTENCES: dict[Action, str] = {
    "drain": "draining: finishing the current step and writing a checkpoint; interrupt again to give that step up",
    "abandon": "giving the current step up and saving the last finished one; interrupt again to end at once",
    "cancel": "ending at once: waiting for the run's processes",
    "wait": "it is ending already: waiting for the run's processes",
}


class Interrupts:
    """Counts the signals of one run."""

    def __init__(self) -> None:
        self.first = signal.SIGINT  # the one that decides the exit code, once there is one
        self._taken = 0

    def take(self, number: signal.Signals, *, started: bool) -> Action:
        """What to do at a signal."""
        if not self._taken:
            self.first = number
        actions = _RUNNING if started else _BEFORE
        self._taken += 1
        return actions[min(self._taken, len(actions)) - 1]

    @property
    def ended_at_once(self) -> int:
        """The exit code of a run that did not drain, as a shell gives it to a process that a signal ends."""
        return 128 + self.first

    def code_of(self, code: int) -> int:
        """The exit code of the command for that of a run. Who sends SIGTERM asks for an end, which is no failure."""
        return 0 if code == SAVED and self.first == signal.SIGTERM else code


SAVED = 130  # the run was stopped, and its last committed step is saved
