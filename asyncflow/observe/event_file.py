"""events.jsonl: every event of a run since its first start, one JSON object per line, `{"at": ..., "event": {...}}`.

A cursor is an offset into the file: 0 is the first event, and each event is read with the cursor after it. So a reader
in any process goes on where it was, after whatever was killed meanwhile. The file only grows; a resumed run appends to
it. Waits are not in it: they change twice a second, and only the last ones matter (`waits.json`).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncflow.observe.journal import drop_torn_end, replace_file
from protocols.control.events import Event, WaitsChanged

EVENTS, WAITS = "events.jsonl", "waits.json"
READ_BYTES = 1 << 18  # read at once, at least one event


class Recorded(msgspec.Struct, frozen=True):
    """One line of the file."""

    at: float  # Unix time
    event: Event


class Line(NamedTuple):
    """One event as it stands in the file, without the line's end."""

    cursor: int  # after it
    text: bytes


class EventFile:
    """The writer of a run's events. A line has reached the operating system before `append` returns."""

    def __init__(self, folder: Path) -> None:
        self.path, self._waits = folder / EVENTS, folder / WAITS
        drop_torn_end(self.path)
        self._file = self.path.open("ab", buffering=0)
        self.end = self.path.stat().st_size  # the cursor after the last event

    def append(self, event: Event) -> int:
        """Write an event; the cursor after it. Raises OSError, with nothing written, if the disk refuses it."""
        line = msgspec.json.encode(Recorded(time.time(), event)) + b"\n"
        written = self._file.write(line)
        if written != len(line):
            os.ftruncate(self._file.fileno(), self.end)
            raise OSError(f"{self.path}: an event was not written whole; is the disk full?")
        self.end += len(line)
        return self.end

    def show_waits(self, waits: WaitsChanged) -> None:
        """Replace the waits that other processes see. A disk that refuses them costs the run nothing."""
        with contextlib.suppress(OSError):
            replace_file(self._waits, msgspec.json.encode(Recorded(time.time(), waits)))

    def close(self) -> None:
        """Close the file. The run is over, so nothing waits any more."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._waits.unlink(missing_ok=True)


def end_of(folder: Path) -> int:
    """The cursor after the last event of a run that is written whole; 0 where there is none yet."""
    try:
        file = (folder / EVENTS).open("rb")
    except FileNotFoundError:
        return 0
    with file:
        start = file.seek(0, os.SEEK_END)
        while start:
            stop, start = start, max(start - READ_BYTES, 0)
            file.seek(start)
            if (found := file.read(stop - start).rfind(b"\n")) >= 0:
                return start + found + 1
    return 0


def read_events(folder: Path, cursor: int, most_bytes: int = READ_BYTES) -> list[Line]:
    """The next events from a cursor on; none at the end. A line that is being written is left for later.

    Raises ValueError for a cursor that no event ends at.
    """
    if not (folder / EVENTS).exists():
        if cursor:
            raise ValueError(f"cursor {cursor}: the run has no events yet: start from 0")
        return []
    with (folder / EVENTS).open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(cursor - 1, 0))
        if cursor > end or cursor < 0 or (cursor and file.read(1) != b"\n"):
            raise ValueError(f"cursor {cursor} is none of this run: start from 0, or from that of an event")
        data = file.read(most_bytes)
        while data and b"\n" not in data and (more := file.read(most_bytes)):
            data += more
    lines, start = [], 0
    while (stop := data.find(b"\n", start)) >= 0:
        lines.append(Line(cursor + stop + 1, data[start:stop]))
        start = stop + 1
    return lines


def line_before(folder: Path, cursor: int) -> bytes:
    """The event that ends at a cursor, without the line's end; nothing for the first cursor."""
    if not cursor:
        return b""
    with (folder / EVENTS).open("rb") as file:
        data, start = b"", cursor - 1
        while b"\n" not in data and start:
            start = max(start - READ_BYTES, 0)
            file.seek(start)
            data = file.read(cursor - 1 - start)
    return data.rpartition(b"\n")[2]


def read_waits(folder: Path) -> bytes:
    """The current waits as a line of events.jsonl has them; nothing where no process runs the run."""
    try:
        return (folder / WAITS).read_bytes()
    except FileNotFoundError:
        return b""
