"""What every benchmark prints as JSON: rows of one form, each value beside its peer and its bound."""

from __future__ import annotations

import os
import platform

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One figure. `ratio` says how many times better than the peer it is; the bound is in the value's unit."""

    name: str
    value: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    bound: float | None = None


class Report(msgspec.Struct, frozen=True):
    """One run of a benchmark."""

    bench: str
    machine: str
    rows: list[Row]


def report(bench: str, rows: list[Row]) -> str:
    """The report of a run on this machine, as text."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    return msgspec.json.format(msgspec.json.encode(Report(bench, machine, rows))).decode()
