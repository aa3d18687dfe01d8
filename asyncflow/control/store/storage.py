"""What a full or read-only disk does to a run: one error that names the path, what it lacks, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM, _NO_QUOTA = "make room, then resume the run", "make room within the quota, then resume the run"
_READ_ONLY, _NO_RIGHT = (
    "mount it writable, or choose another folder",
    "let this user write there, or choose another one",
)
_REMEDIES = {  # by its text, which is all that there is of another process's error
    os.strerror(errno.ENOSPC): _NO_ROOM,
    os.strerror(errno.EDQUOT): _NO_QUOTA,
    os.strerror(errno.EFBIG): "raise the limit on a file's size (ulimit -f), then resume the run",
    os.strerror(errno.EROFS): _READ_ONLY,
    os.strerror(errno.EACCES): _NO_RIGHT,
    os.strerror(errno.EPERM): _NO_RIGHT,
    "database or disk is full": _NO_ROOM,  # SQLite's own texts
    "disk I/O error": _NO_ROOM,
    "readonly database": _READ_ONLY,
}


class StorageFailed(Exception):
    """The run's folder can't be written. Everything before the last checkpoint is safe."""


@contextmanager
def storing(what: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the OSError or sqlite3 error of a write below `path` into StorageFailed.

    `needed_bytes`: the least that is written, 0 where that is not known.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise failure(what, path, error, needed_bytes) from error


def failure(what: str, path: Path, error: BaseException, needed_bytes: int = 0) -> StorageFailed:
    """The error of a write that failed."""
    cause, where = str(error), path
    if isinstance(error, OSError):
        cause, where = error.strerror or str(error), Path(os.fsdecode(error.filename)) if error.filename else path
    remedy = next((remedy for text, remedy in _REMEDIES.items() if text in str(error)), "choose another folder")
    room = ""
    if remedy in (_NO_ROOM, _NO_QUOTA):
        needs = f"it needs at least {_megabytes(needed_bytes)}, " if needed_bytes else ""
        room = f"{needs}{_megabytes(free_bytes(path))} are free; "
    return StorageFailed(f"{what}: {where} can't be written: {cause}: {room}{remedy}")


def is_shortage(text: str) -> bool:
    """Whether another process's error says that files can't be written: a full disk, a limit, a lack of rights."""
    return any(known in text for known in _REMEDIES)


def free_bytes(path: Path) -> int:
    """What this user may still write to the file system of a path, which need not exist."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def size_of(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
