"""What services of one process must not do at the same time: load a model while another one loads or computes.

transformers and vLLM change settings of the whole process while they load a model, such as torch's default dtype, and
write to its standard error from C++. On Ray each service has a process of its own, and nothing here waits.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_changed = threading.Condition()
_own = threading.local()  # `computes`: whether this thread is inside `computing`
_computing = 0  # threads
_loaders = 0  # threads that load, or wait for it
_loading = False


@contextmanager
def computing() -> Iterator[None]:
    """Context of a worker's work. Waits while a model is loaded in this process."""
    global _computing  # noqa: PLW0603 - it is a property of the process
    if getattr(_own, "computes", False):
        yield
        return
    with _changed:
        _changed.wait_for(lambda: not _loaders)
        _computing += 1
    _own.computes = True
    try:
        yield
    finally:
        _own.computes = False
        with _changed:
            _computing -= 1
            _changed.notify_all()


@contextmanager
def loading(log_path: str) -> Iterator[None]:
    """Context in which a model is loaded, alone in this process; what is written to standard error goes to the log."""
    global _computing, _loaders, _loading  # noqa: PLW0603
    # A thread that computes does nothing else meanwhile. Two of them that waited for each other would wait for ever.
    computes = int(getattr(_own, "computes", False))
    with _changed:
        _loaders += 1
        _computing -= computes
        _changed.notify_all()
        _changed.wait_for(lambda: not _loading and not _computing)
        _loading = True
    try:
        with _standard_error_to(log_path):
            yield
    finally:
        with _changed:
            _loaders -= 1
            _loading = False
            _computing += computes
            _changed.notify_all()


@contextmanager
def _standard_error_to(path: str) -> Iterator[None]:
    """Divert what this thread and C++ write. Other threads of the program keep their sys.stderr."""
    if not path:
        yield
        return
    before = sys.stderr
    saved = os.dup(2)
    with (
        Path(path).open("a", buffering=1, encoding="utf-8", errors="replace") as lines,
        os.fdopen(saved, "a", buffering=1) as real,
    ):
        os.dup2(lines.fileno(), 2)
        sys.stderr = _ByThread(lines, real if _is_second(before) else before)
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(saved, 2)


def _is_second(stream: TextIO | None) -> bool:
    """Whether a stream writes to descriptor 2; a notebook's does not."""
    try:
        return stream is not None and stream.fileno() == 2
    except (OSError, ValueError):
        return False


class _ByThread(io.TextIOBase):
    """Writes what the creating thread writes to one stream, and what others write to another."""

    def __init__(self, own: TextIO, others: TextIO | None) -> None:
        self._thread, self._own, self._others = threading.get_ident(), own, others

    def write(self, text: str, /) -> int:
        stream = self._own if threading.get_ident() == self._thread else self._others
        return stream.write(text) if stream is not None else len(text)

    def flush(self) -> None:
        for stream in (self._own, self._others):
            if stream is not None and not stream.closed:
                stream.flush()
