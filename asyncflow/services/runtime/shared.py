"""SharedFrame: a frame in memory that the processes of one node share, for as long as any of them holds it.

The memory is an unnamed file (memfd), sealed once it is written, so nobody can change or truncate it under a reader.
Processes send each other its descriptor over a socket, and the kernel counts the references. So no process has to
release a frame explicitly, a producer that dies loses no rows, and a killed process leaks no memory.

In Ray's object store a frame is lost with the process that owns it, costs a call to the raylet, and may be spilled. The
names of multiprocessing.shared_memory outlive processes that are killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import sys
import threading
import weakref

import numpy as np

from asyncflow.services.channels.endpoint import Frame

AVAILABLE = sys.platform == "linux"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if AVAILABLE else 0


class SharedFrame:
    """One frame. It lives as long as this object or one of its mappings, here or in any other process."""

    __slots__ = ("__weakref__", "fd", "nbytes")

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes ownership of the descriptor. Use `of` or `received` instead."""
        self.fd, self.nbytes = fd, nbytes
        _holdings.add(1, nbytes)

    def __del__(self) -> None:
        _holdings.add(-1, -self.nbytes)
        with contextlib.suppress(OSError):  # at the end of the interpreter
            os.close(self.fd)

    @classmethod
    def of(cls, frame: Frame) -> SharedFrame:
        """Copy a frame, which is not empty. Raises OSError if there is no memory or no descriptor for it."""
        fd = os.memfd_create("asyncflow frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            rest = frame.data
            while rest:
                rest = rest[os.write(fd, rest) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, frame.nbytes)

    @classmethod
    def received(cls, fd: int) -> SharedFrame:
        """A frame that another process sent. Raises ValueError, and closes the descriptor, if it is no such frame."""
        try:
            seals, nbytes = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
        except OSError as error:  # no memfd
            os.close(fd)
            raise ValueError(f"descriptor {fd} is no shared frame: {error}") from error
        if seals & _SEALS != _SEALS or not nbytes:
            os.close(fd)
            raise ValueError(f"descriptor {fd} is no shared frame: {nbytes} bytes with seals {seals:#x}")
        return cls(fd, nbytes)

    def map(self) -> Frame:
        """The bytes as a read-only array, without a copy."""
        # A write through it, which a tensor made from the array allows, changes a private copy only.
        mapping = mmap.mmap(self.fd, self.nbytes, access=mmap.ACCESS_COPY)
        _holdings.add(1, self.nbytes)  # a mapping has its own descriptor, and outlives this object
        weakref.finalize(mapping, _holdings.add, -1, -self.nbytes).atexit = False
        frame = np.frombuffer(mapping, np.uint8)
        frame.flags.writeable = False
        return frame


class Holdings:
    """The shared memory that this process holds; a frame and each of its mappings count the same."""

    def __init__(self) -> None:
        # Reentrant: a garbage collection may free a frame while another is counted.
        self._lock = threading.RLock()
        self.frames = 0
        self.nbytes = 0

    def add(self, frames: int, nbytes: int) -> None:
        """Count frames that were added, or with negative numbers freed."""
        with self._lock:
            self.frames += frames
            self.nbytes += nbytes

    def room(self, most_bytes: int, more: int = 0) -> bool:
        """Whether another frame of `more` bytes stays within `most_bytes` and a quarter of the descriptors."""
        most_frames = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        with self._lock:
            return self.nbytes + more <= most_bytes and self.frames + bool(more) <= most_frames


_holdings = Holdings()


def holdings() -> Holdings:
    """The holdings of this process."""
    return _holdings
