"""The wait-for graph: who waits for what on whom. A stalled run prints it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from protocols.control.notices import Waiting


class WaitBoard:
    """The current wait of every stage."""

    def __init__(self) -> None:
        self._waits: dict[str, Waiting] = {}

    def note(self, waiting: Waiting) -> None:
        """Record a report; an empty `what` ends the wait."""
        if waiting.what:
            self._waits[waiting.who] = waiting
        else:
            self._waits.pop(waiting.who, None)

    def current(self, silent: Collection[str] = ()) -> dict[str, str]:
        """stage -> "what on whom", for a live view. `silent`: stages whose last word is out of date."""
        waits = sorted((who, w) for who, w in self._waits.items() if who not in silent)
        return {who: f"{w.what} on {w.on}" if w.on else w.what for who, w in waits}

    def graph(
        self, now: float, holders: Mapping[str, str] = MappingProxyType({}), silent: Collection[str] = ()
    ) -> list[str]:
        """One line an edge, the longest wait first.

        Args:
            holders: pool -> the stage that holds its lease.
            silent: stages whose last word is out of date.
        """
        return [
            f"{w.who} waits for {w.what}{f' on {w.on}' if w.on else ''}"
            f"{f', held by {holders[w.on]},' if w.on in holders else ''} since {max(0.0, now - w.since):.0f} s"
            for w in sorted(self._waits.values(), key=lambda w: w.since)
            if w.who not in silent
        ]
