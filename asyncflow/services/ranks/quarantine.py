"""Quarantine keeps refused frames beside the run's logs, each with the reason, so that a person can inspect them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from asyncflow.services.channels.endpoint import Frame

MOST_KEPT = 16  # per process; later ones are only counted


class Quarantine:
    """The refused frames of one process of a service."""

    def __init__(self, log_path: str, name: str) -> None:
        self._folder = Path(log_path).parent / "quarantine" if log_path else None
        self._name = name
        self._kept = 0

    def keep(self, frame: Frame, reason: str) -> None:
        """Write a frame and the reason for its refusal. Blocking, but seldom: at most MOST_KEPT times."""
        self._kept += 1
        if self._folder is None or self._kept > MOST_KEPT:
            return
        stem = self._folder / f"{self._name}-{os.getpid()}-{self._kept}"
        with contextlib.suppress(OSError):  # a full disk: the frame is counted, and its rows fail with the reason
            self._folder.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".txt").write_text(f"{reason}\n")
            stem.with_suffix(".frame").write_bytes(frame.tobytes())
