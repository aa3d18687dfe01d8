"""How busy a machine is with somebody else's work: a measurement says so, and one that was disturbed is taken again.

What all processes computed, of `/proc/stat`, less what this process and its descendants did. Who ends in between
counts as far as it was last seen: look, where processes come and go.
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


class Watch:
    """From its making on."""

    def __init__(self) -> None:
        self._since, self._busy = time.monotonic(), _busy_s()
        self._first = _own_s()
        self._own = dict(self._first)  # process -> seconds that it has worked

    def look(self) -> None:
        """See what one's own processes have done so far."""
        self._own |= _own_s()

    @contextmanager
    def looking(self, every_s: float = 0.5) -> Iterator[None]:
        """Look all the time, in a thread."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(every_s):
                self.look()

        thread = threading.Thread(target=look, name="watch")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def others(self) -> float:
        """Share of the machine's cores that others have taken since; ask while one's own processes still live."""
        self.look()
        passed = (time.monotonic() - self._since) * (os.cpu_count() or 1)
        own = sum(self._own.values()) - sum(self._first.values())
        return max(0.0, _busy_s() - self._busy - own) / passed


def _busy_s() -> float:
    """Seconds that the cores have worked, for users and for the system."""
    user, nice, system, _idle, _wait, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / TICKS


def _own_s() -> dict[int, float]:
    """Seconds that this process and its descendants have worked, each."""
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
