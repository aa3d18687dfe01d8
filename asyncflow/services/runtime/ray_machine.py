"""What a Ray on this machine needs of it: a folder for its sockets and logs, a token, shared memory."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import ray

from asyncflow.services.channels.endpoint import ServiceError

_SHARED_MEMORY = Path("/dev/shm")
_SOCKET_BYTES = 107  # the most that a Unix socket's path may have on Linux
_LONGEST_SOCKET = "/ray/session_2026-11-30_23-59-59_123456_4194304/sockets/plasma_store.1"
_LEAST_FREE = 16_000_000  # bytes


def temp_folder(environ: Mapping[str, str]) -> str:
    """A folder for Ray's sockets and logs that exists, can be written, and has a path that is short enough.

    RAY_TMPDIR says it; otherwise it is TMPDIR, or /tmp where that does not do. Raises ServiceError.
    """
    told = environ.get("RAY_TMPDIR", "")
    candidates = [told] if told else [*filter(None, [environ.get("TMPDIR", "")]), "/tmp"]
    defects = [(folder, defect) for folder in candidates if (defect := _defect_of(folder))]
    usable = [folder for folder in candidates if folder not in dict(defects)]
    if not usable:
        reasons = "; ".join(f"{folder} {defect}" for folder, defect in defects)
        raise ServiceError(
            f"Ray has no folder for its sockets: {reasons}; set RAY_TMPDIR to a short writable one with room"
        )
    return usable[0]


def _defect_of(folder: str) -> str:
    """Why Ray can't use a folder; "" if it can."""
    longest = _SOCKET_BYTES - len(_LONGEST_SOCKET)
    if len(os.fsencode(folder)) > longest:
        return f"has {len(os.fsencode(folder))} bytes in its path, and sockets below it allow {longest}"
    if not Path(folder).is_dir():
        return "is no folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "can't be written"
    free = shutil.disk_usage(folder).free
    return "" if free >= _LEAST_FREE else f"has {free / 1e6:.1f} MB free, and Ray's logs want {_LEAST_FREE / 1e6:.0f}"


def ensure_token() -> None:
    """Give a Ray of our own a token in the environment where it can't keep one in the home folder."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        kept = Path.home() / ".ray" / "auth_token"
        kept.parent.mkdir(parents=True, exist_ok=True)
        writable = kept.exists() or os.access(kept.parent, os.W_OK)
    except (OSError, RuntimeError):  # no home folder, or one that can't be written
        writable = False
    if not writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def small_shared_memory() -> list[str]:
    """A warning where the object store that Ray has started is larger than shared memory."""
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    there = shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else 0
    if there >= store:
        return []
    return [
        f"{_SHARED_MEMORY} holds {there / 1e6:.0f} MB, Ray's object store {store / 1e6:.0f} MB: it is kept on disk, "
        f"which is slower; enlarge it (docker run --shm-size) or lower store_bytes"
    ]


def why_not_started() -> str:
    """What this machine lacks for a Ray that did not start; "" where nothing is known."""
    if not _SHARED_MEMORY.is_dir():
        return f"this machine has no {_SHARED_MEMORY}: mount a tmpfs there"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY:
        return f"a file may have {limit / 1e6:.1f} MB here, which is too little for Ray: ulimit -f unlimited"
    return ""
