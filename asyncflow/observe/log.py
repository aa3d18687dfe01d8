"""Log files: each run's controller and each service has one of its own, in plain sentences with their time.

A logger here is in no registry and has no parent, so that two runs in one program never write into each other's file,
and the logging of the program that runs them stays as it is. A run of weeks keeps at most twice LOG_BYTES of each.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(message)s"
LOG_BYTES = 64 << 20  # of one file; what was before stands beside it, in NAME.log.1


class _LogFile(logging.FileHandler):
    """A log file that can fill its disk without a word on standard error, where `logging` would print a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record, and set a file that has become too large aside."""
        super().emit(record)
        with contextlib.suppress(OSError):  # a full disk: the file stays as it is
            if Path(self.baseFilename).stat().st_size > LOG_BYTES:
                self._set_aside()

    def _set_aside(self) -> None:
        # Copied and emptied, not renamed: the descriptors of the process's own output append to the same file.
        partial = shutil.copyfile(self.baseFilename, f"{self.baseFilename}.partial")
        Path(partial).replace(f"{self.baseFilename}.1")
        os.truncate(self.baseFilename, 0)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Drop the record: what a run's result depends on stands in its ledger and its journals."""


def open_log(path: str | Path) -> logging.Logger:
    """A logger that appends to a file; one that drops everything where the path is empty. Raises OSError."""
    log = logging.Logger("asyncflow", logging.INFO)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter(FORMAT))
        log.addHandler(handler)
    else:
        log.addHandler(logging.NullHandler())
    return log


def close_log(log: logging.Logger) -> None:
    """Close its file. Idempotent."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.addHandler(logging.NullHandler())
