"""How much of a machine's CPU time other programs use, so that a disturbed measurement can be repeated.

It is the CPU time of all processes in `/proc/stat`, less that of this process and its descendants. A descendant that
ends counts with its time at the last sample, so sample repeatedly while processes start and end.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class LoadMonitor:
    """Measures from its creation on."""

    def __init__(self) -> None:
        self._since, self._busy = time.monotonic(), _busy_s()
        self._first = _own_s()
        self._own = dict(self._first)  # process -> its CPU seconds

    def sample(self) -> None:
        """Record the CPU seconds of this process and its descendants."""
        self._own |= _own_s()

    @contextmanager
    def sampling(self, every_s: float = 0.5) -> Iterator[None]:
        """Sample repeatedly in a thread."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(every_s):
                self.sample()

        thread = threading.Thread(target=run, name="load-monitor")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def others(self) -> float:
        """The share of the machine's CPU time that other programs used. Call it while one's own processes live."""
        self.sample()
        passed = (time.monotonic() - self._since) * (os.cpu_count() or 1)
        own = sum(self._own.values()) - sum(self._first.values())
        return max(0.0, _busy_s() - self._busy - own) / passed


def _busy_s() -> float:
    """CPU seconds of all cores since the machine started, user and system."""
    user, nice, system, _idle, _wait, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / TICKS


def _own_s() -> dict[int, float]:
    """The CPU seconds of this process and of each of its descendants."""
    children, seconds = defaultdict[int, list[int]](list), dict[int, float]()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        children[int(fields[1])].append(int(folder.name))
        seconds[int(folder.name)] = sum(map(int, fields[11:13])) / TICKS
    own, left = dict[int, float](), [os.getpid()]
    while left:
        process = left.pop()
        own[process] = seconds.get(process, 0.0)
        left += children[process]
    return own
