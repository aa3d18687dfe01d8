"""How busy a machine is with somebody else's work: a measurement says so, and one that was disturbed is taken again.

What all processes computed, of `/proc/stat`, less what this process and its descendants did, those that have ended
and were waited for included.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """From its making on."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        """Share of the machine's cores that others have taken since; ask while one's own processes still live."""
        then, (moment, busy, own) = self._start, self._now()
        passed = (moment - then[0]) * (os.cpu_count() or 1)
        return max(0.0, (busy - then[1]) - (own - then[2])) / passed

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), _busy_s(), _own_s()


def _busy_s() -> float:
    """Seconds that the cores have worked, for users and for the system."""
    user, nice, system, _idle, _wait, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / TICKS


def _own_s() -> float:
    """Seconds that this process and its descendants have worked."""
    children, seconds = defaultdict[int, list[int]](list), dict[int, float]()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        children[int(fields[1])].append(int(folder.name))
        seconds[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS
    total, left = 0.0, [os.getpid()]
    while left:
        process = left.pop()
        total += seconds.get(process, 0.0)
        left += children[process]
    return total
