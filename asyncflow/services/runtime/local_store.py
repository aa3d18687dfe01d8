"""LocalStore keeps the frames of one process: in memory up to a budget, beyond it in files.

Admission bounds the rows in flight, so a sender never waits for memory: frames beyond the budget go to disk, and are
mapped when they are read. A sender waits only for a mailbox's credit, which counts rows.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from pathlib import Path

import numpy as np

from asyncflow.services.channels.endpoint import Frame, Payload

DEFAULT_BUDGET = 1 << 30  # bytes


class Spilled:
    """A frame in a file. The file is removed with this object."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        weakref.finalize(self, path.unlink, missing_ok=True)


class LocalStore:
    """Implements `Store`. Frames are read-only, since consumers share them. Thread-safe."""

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET) -> None:
        self._budget = budget_bytes
        # Reentrant: a garbage collection during `put` may free frames, whose finalizers call `_release`.
        self._lock = threading.RLock()
        self._held = 0  # bytes of the frames in memory that are still referenced
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        frame.flags.writeable = False
        with self._lock:
            if self._held + frame.nbytes <= self._budget:
                self._held += frame.nbytes
                weakref.finalize(frame, self._release, frame.nbytes)
                return frame
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="asyncflow-spill-", ignore_cleanup_errors=True)
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.frame"
        try:
            frame.tofile(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 1e6
            raise OSError(
                f"rows of {frame.nbytes / 1e6:.1f} MB beyond store_bytes don't fit into {path.parent}, where "
                f"{free:.1f} MB are free: {error}; make room there, set TMPDIR to another folder, or raise store_bytes"
            ) from error
        return Spilled(path, frame.nbytes)

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        """0: no frame travels in a message, so none is cut."""
        return 0

    async def get(self, payload: Payload) -> Frame:
        if isinstance(payload, Spilled):
            return np.memmap(payload.path, np.uint8, "r").view(np.ndarray)
        return payload

    def inline_bytes(self, payload: Payload) -> int:
        """0: no frame travels in a message."""
        return 0

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._held -= nbytes
