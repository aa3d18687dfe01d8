"""Who waits for what on whom: the graph that a stalled run prints. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from protocols.control.notices import Waiting


class WaitBoard:
    """The last word of every stage about what it waits for."""

    def __init__(self) -> None:
        self._waits: dict[str, Waiting] = {}

    def note(self, waiting: Waiting) -> None:
        """Take a report; an empty `what` ends the wait."""
        if waiting.what:
            self._waits[waiting.who] = waiting
        else:
            self._waits.pop(waiting.who, None)

    def current(self) -> dict[str, str]:
        """stage -> "what on whom", for a live view."""
        return {who: f"{w.what} on {w.on}" if w.on else w.what for who, w in sorted(self._waits.items())}

    def graph(self, now: float, holders: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """A line an edge, the longest wait first; `holders` says who has what others wait for: pool -> stage."""
        return [
            f"{w.who} waits for {w.what}{f' on {w.on}' if w.on else ''}"
            f"{f', held by {holders[w.on]},' if w.on in holders else ''} since {max(0.0, now - w.since):.0f} s"
            for w in sorted(self._waits.values(), key=lambda w: w.since)
        ]
