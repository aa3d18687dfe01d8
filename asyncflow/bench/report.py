"""The common result of all benchmarks: rows for programs, lines for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

Key = TypeVar("Key")
Result = TypeVar("Result")


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

    @classmethod
    def joined(cls, parts: Iterable[Measured]) -> Measured:
        """The rows and the lines of all parts, in order."""
        found = list(parts)
        return cls([row for part in found for row in part.rows], [line for part in found for line in part.lines])


class Mean(NamedTuple):
    """A figure over seeds: the mean and the sample standard deviation (0 for one seed)."""

    value: float
    spread: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.spread:.3f}"


def grouped(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, list[Result]]:
    """The results of each key, in order of first appearance."""
    found: dict[Key, list[Result]] = {}
    for result in results:
        found.setdefault(key(result), []).append(result)
    return found


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table; no lines if it has no rows."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *body)] if body else []


def format_report(bench: str, rows: list[BenchRow]) -> str:
    """The JSON text of a run on this machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    return msgspec.json.format(msgspec.json.encode(Report(bench, machine, rows))).decode()
