"""The journals metrics.jsonl, evaluations.jsonl and samples.jsonl: one JSON object per line, intact after any crash.

The ledger decides which steps happened. A restart rewinds the journal to the step from which it resumes, so no step
occurs twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from protocols.control.events import Evaluated, StepCommitted
from protocols.control.samples import SampleLine

Journaled = StepCommitted | Evaluated | SampleLine


class MetricsJournal:
    """An append-only file of steps, of evaluations or of samples.

    A line is passed to the operating system before `append` returns, so a crash of this process loses nothing. A line
    that a power cut left incomplete is removed when the journal is opened again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_end(path)
        self._file = path.open("ab", buffering=0)

    def append(self, event: Journaled) -> None:
        """Write one event as one line. Raises OSError if the disk refuses it, e.g. because it is full."""
        line = msgspec.json.encode(line_of(event)) + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: the line of step {event.step} was not written whole; is the disk full?")

    def rewind(self, step: int) -> None:
        """Remove the lines of all steps after `step`, which were not committed or were rolled back."""
        self._keep([line for line in whole_lines(self._path) if msgspec.json.decode(line)["step"] <= step])

    def thin_out(self, most_bytes: int) -> None:
        """Remove every second line, but not the newest, where the file is larger than `most_bytes`."""
        if self._file.tell() > most_bytes:
            self._keep(whole_lines(self._path)[::-1][::2][::-1])

    def _keep(self, lines: list[bytes]) -> None:
        self._file.close()
        replace_file(self._path, b"".join(line + b"\n" for line in lines))
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line_of(event: Journaled) -> dict[str, Any]:
    """An event as one flat object: its fields, then its metrics by dotted name. NaN is written as null."""
    fields = msgspec.structs.asdict(event)
    metrics = fields.pop("metrics", {})
    return {**fields, **{name: value for name, value in metrics.items() if name not in fields}}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a journal, which a run may still be writing; none if there is no file."""
    return [msgspec.json.decode(line) for line in whole_lines(path)]


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a JSON-lines file up to the last complete one; none if there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return data[: _whole_bytes(data)].splitlines()


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file atomically, so that a reader always finds a complete one; returns its path."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    return part.replace(path)


def drop_torn_end(path: Path) -> None:
    """Truncate the file after its last complete line."""
    if path.exists():
        whole = _whole_bytes(path.read_bytes())
        with path.open("r+b") as file:
            file.truncate(whole)


def _whole_bytes(data: bytes) -> int:
    """Length of the journal up to its last complete line, i.e. one that has a line end and is a JSON object."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            msgspec.json.decode(data[start:end], type=dict)
            return end
        except (msgspec.DecodeError, UnicodeDecodeError):  # a power cut can leave a block of zeros, ended or not
            end = start
    return 0
