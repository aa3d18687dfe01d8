"""A frame in memory that processes of one node share. It lives as long as any process holds it.

The memory is a file without a name (memfd), sealed once it is written: nobody can change it, or cut it off under a
reader. Processes hand each other its descriptor, on the wire, and the kernel counts who has one. So nothing has to be
released, a producer that dies takes no rows along, and processes that are killed leave nothing behind.

Reason against Ray's object store: there a frame is lost with the process that owns it, costs a call to the raylet, and
may be spilled. Reason against multiprocessing.shared_memory: its names outlive processes that are killed.
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
    """One frame, for as long as this object or one of its mappings lives, here or in any other process."""

    __slots__ = ("__weakref__", "fd", "nbytes")

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes the descriptor over. For `of` and `received`."""
        self.fd, self.nbytes = fd, nbytes
        _holdings.add(1, nbytes)

    def __del__(self) -> None:
        _holdings.add(-1, -self.nbytes)
        with contextlib.suppress(OSError):  # at the end of the interpreter
            os.close(self.fd)

    @classmethod
    def of(cls, frame: Frame) -> SharedFrame:
        """A copy of a frame that is not empty. Raises OSError where there is no memory, or no descriptor, for it."""
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
        """What another process handed over. Raises ValueError, and closes it, where it is not such a frame."""
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
        """Its bytes, without a copy, for as long as the array lives. Read-only."""
        # What nevertheless writes through it, as a tensor made of the array can, writes a copy of its own.
        mapping = mmap.mmap(self.fd, self.nbytes, access=mmap.ACCESS_COPY)
        _holdings.add(1, self.nbytes)  # it has a descriptor of its own, and outlives this object
        weakref.finalize(mapping, _holdings.add, -1, -self.nbytes).atexit = False
        frame = np.frombuffer(mapping, np.uint8)
        frame.flags.writeable = False
        return frame


class Holdings:
    """How much of the shared memory this process holds; a frame and each of its mappings count alike."""

    def __init__(self) -> None:
        # Reentrant: a frame may be let go by a collection that begins while another is counted.
        self._lock = threading.RLock()
        self.frames = 0
        self.nbytes = 0

    def add(self, frames: int, nbytes: int) -> None:
        """Count frames that came, or went."""
        with self._lock:
            self.frames += frames
            self.nbytes += nbytes

    def room(self, most_bytes: int, more: int = 0) -> bool:
        """Whether it may hold `more` bytes in another frame: within `most_bytes`, and a quarter of its descriptors."""
        most_frames = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        with self._lock:
            return self.nbytes + more <= most_bytes and self.frames + bool(more) <= most_frames


_holdings = Holdings()


def holdings() -> Holdings:
    """This process's."""
    return _holdings
