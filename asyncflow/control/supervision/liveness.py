"""Which services answer: each has a question before it at all times, and silence beyond a deadline ends it. Pure.

A process that is stopped or hangs is not gone: calls to it wait for ever, and what others wait for is its rows. Its own
last word about what it waits for means nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

NOTABLE_SECONDS = 5.0  # of silence, from which on it is shown
MOST_SECONDS = 2.0  # that one tick counts: in a longer one this process itself was stopped, and could hear nobody


class Silence(msgspec.Struct, frozen=True):
    """A service that has passed a deadline; `ends`: it is to be ended."""

    service: str
    seconds: float
    ends: bool


class Liveness:
    """How long each service has left its question unanswered."""

    def __init__(self, report_seconds: float, end_seconds: Callable[[str], float]) -> None:
        """A silence is reported once after `report_seconds`; after `end_seconds` of the service that one is ended."""
        self._report, self._end = report_seconds, end_seconds
        self._unanswered: dict[str, float] = {}  # service -> seconds

    def asked(self, service: str) -> None:
        """It has a question before it."""
        self._unanswered[service] = 0.0

    def answered(self, service: str) -> None:
        """It has answered, or is known to be gone."""
        self._unanswered.pop(service, None)

    def elapse(self, seconds: float) -> list[Silence]:
        """Time has passed. Returns the silences that now are to be reported, or ended."""
        passed: list[Silence] = []
        for service, before in self._unanswered.items():
            now = self._unanswered[service] = before + min(seconds, MOST_SECONDS)
            ends = before < self._end(service) <= now
            if ends or before < self._report <= now:
                passed.append(Silence(service, now, ends))
        return passed

    @property
    def silent(self) -> dict[str, float]:
        """The services that have been silent for a notable time -> seconds, the longest first."""
        found = {service: s for service, s in self._unanswered.items() if s >= NOTABLE_SECONDS}
        return dict(sorted(found.items(), key=lambda item: -item[1]))
