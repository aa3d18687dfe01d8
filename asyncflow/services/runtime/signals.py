"""Signals of a program that starts Ray: its own handlers stay, and Ray's processes leave its signals to it.

A terminal, `kill -- -PGID` and service managers signal all processes of a program. The program then drains, for which
it needs Ray and its actors: they must not end before it ends them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def shield_children() -> None:
    """Block the stopping signals in this thread, for good, and so in all processes that it starts.

    Ray ends those processes by SIGKILL where SIGTERM does not end them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """The program's handler of SIGTERM is in force again after the body, if that runs in the main thread.

    Connecting to Ray installs a handler in C, which runs the program's own and aborts the process three seconds later:
    a run that drains for longer would lose what it has trained.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: it was not installed from Python
            signal.signal(signal.SIGTERM, before)
