"""endpoint.json: where the process of a run answers, and with which token. Only the run's user can read it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from protocols.control.runs import Endpoint

ENDPOINT = "endpoint.json"


def write_endpoint(folder: Path, endpoint: Endpoint) -> None:
    """Write it, with its mode from the first moment."""
    part = folder / f".{ENDPOINT}.{os.getpid()}"
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(endpoint))
    part.replace(folder / ENDPOINT)


def read_endpoint(folder: Path, process: int) -> Endpoint | None:
    """The endpoint of a run's process; None where it has none yet, or none at all."""
    try:
        found = msgspec.json.decode((folder / ENDPOINT).read_bytes(), type=Endpoint)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.process == process else None
