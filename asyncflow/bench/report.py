"""The common result of all benchmarks: rows for programs, lines for people."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple

import msgspec


class BenchRow(msgspec.Struct, frozen=True):
    """One figure. `ratio` is how many times better it is than the peer's; `bound` has the value's unit."""

    name: str
    value: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    bound: float | None = None


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints: one run of a benchmark."""

    bench: str
    machine: str
    rows: list[BenchRow]


class Measured(NamedTuple):
    """What a benchmark's `run` returns."""

    rows: list[BenchRow]
    lines: list[str]


def format_report(bench: str, rows: list[BenchRow]) -> str:
    """The JSON text of a run on this machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    return msgspec.json.format(msgspec.json.encode(Report(bench, machine, rows))).decode()
