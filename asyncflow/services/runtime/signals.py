"""A program's signal handlers, kept while a library installs its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
