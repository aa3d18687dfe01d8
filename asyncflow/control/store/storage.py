"""What a full or failing disk does to a run: one error that names the path, what it lacks, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHORTAGES = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))


class StorageFailed(Exception):
    """The run's folder can't be written. Everything before the last checkpoint is safe."""


@contextmanager
def storing(what: str, path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the OSError or sqlite3 error of a write below `path` into StorageFailed.

    `needed_bytes`: what is written, 0 where that is not known.
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
    needs = f"needs {_megabytes(needed_bytes)}, " if needed_bytes else ""
    return StorageFailed(
        f"{what}: {where} can't be written: {cause}: {needs}{_megabytes(free_bytes(path))} are free; "
        f"make room, then resume the run"
    )


def is_shortage(text: str) -> bool:
    """Whether another process's error says that a file system is full, over its quota, or read-only."""
    return any(shortage in text for shortage in _SHORTAGES)


def free_bytes(path: Path) -> int:
    """What this user may still write to the file system of a path, which need not exist."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def size_of(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
