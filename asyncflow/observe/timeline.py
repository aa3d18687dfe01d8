"""The timeline of a run: spans of activity, journaled during the run, exported for Perfetto, summed up to idle shares.

A service may do several things at once (generate while it loads, score two groups). So its busy time is the length of
the union of its spans, and its track has one lane per overlap.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from asyncflow.observe.journal import replace_file, whole_lines
from protocols.control.notices import Span

Interval = tuple[float, float]


class Timeline:
    """The last `keep` spans of a run, in memory and in a journal that a restart reads again.

    Neither grows with the run: the journal is rewritten when it has twice as many spans.
    """

    def __init__(self, journal: Path, keep: int = 50_000) -> None:
        if keep < 1:
            raise ValueError(f"a timeline keeps at least one span, got keep={keep}")
        earlier = (msgspec.json.decode(line, type=Span) for line in whole_lines(journal))
        self.spans: deque[Span] = deque(earlier, maxlen=keep)
        self._keep = keep
        self._path = journal
        self._file = self._rewritten()

    def add(self, spans: Iterable[Span]) -> None:
        """Add finished spans, in any order."""
        new = list(spans)
        self.spans.extend(new)
        self._lines += len(new)
        if self._lines > 2 * self._keep:
            self._file.close()
            self._file = self._rewritten()
        else:
            self._file.write(_encode(new))
            self._file.flush()

    def write(self, path: Path) -> Path:
        """Write timeline.json: open it at ui.perfetto.dev, or give it to `read_spans`."""
        return replace_file(path, msgspec.json.encode(trace_of(self.spans)))

    def close(self) -> None:
        """Close the journal."""
        with contextlib.suppress(OSError):  # what a full disk refused once is still in its buffer
            self._file.close()

    def _rewritten(self) -> BinaryIO:
        """Rewrite the journal with exactly the kept spans; returns it open for appending."""
        replace_file(self._path, _encode(self.spans))
        self._lines = len(self.spans)
        return self._path.open("ab")


def trace_of(spans: Iterable[Span]) -> dict[str, Any]:
    """The spans as a Chrome trace: a process per service, a thread per lane, times in microseconds from the first span.

    Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("X" and "M" events).
    """
    by_service: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_service[span.service].append(span)
    origin = min((span.start for own in by_service.values() for span in own), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, service in enumerate(sorted(by_service), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": service}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        for lane, own in enumerate(lanes_of(by_service[service])):
            name = service if lane == 0 else f"{service} ({lane + 1})"
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": {"name": name}})
            events.extend(_slice(span, pid, lane, origin) for span in own)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin_seconds": origin}}


def read_spans(path: Path) -> list[Span]:
    """The spans of a timeline.json, by start. Raises msgspec.DecodeError for a file of another form."""
    trace = msgspec.json.decode(path.read_bytes(), type=_Trace)
    services = {e.pid: str(e.args["name"]) for e in trace.trace_events if e.name == "process_name"}
    origin = trace.other_data["origin_seconds"]
    spans = [
        Span(
            service=services[event.pid],
            activity=event.name,
            start=origin + event.ts / 1e6,
            end=origin + (event.ts + event.dur) / 1e6,
            rows=int(event.args.get("rows", 0)),
            step=int(event.args.get("step", -1)),
        )
        for event in trace.trace_events
        if event.ph == "X"
    ]
    return sorted(spans, key=lambda span: span.start)


def lanes_of(spans: Iterable[Span]) -> list[list[Span]]:
    """The fewest lanes in which no two spans overlap, each sorted by start (greedy interval partitioning)."""
    lanes: list[list[Span]] = []
    free: list[tuple[float, int]] = []  # (end of the lane's last span, lane)
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        if free and free[0][0] <= span.start:
            _, lane = heapq.heappop(free)
        else:
            lane = len(lanes)
            lanes.append([])
        lanes[lane].append(span)
        heapq.heappush(free, (max(span.end, span.start), lane))
    return lanes


def union_seconds(intervals: Iterable[Interval]) -> float:
    """Length of the union of intervals, in seconds; an interval that ends before it starts counts 0."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """How services used a window of time."""

    seconds: float  # length of the window
    busy: dict[str, float]  # service -> share of the window in which it worked, 0 to 1
    generation_seconds: float  # union of all `generate` spans
    training_seconds: float  # union of all `update` spans

    @property
    def idle(self) -> dict[str, float]:
        """Service -> share of the window in which it was idle."""
        return {service: 1.0 - share for service, share in self.busy.items()}

    @property
    def idle_bounds(self) -> dict[str, float]:
        """Service -> smallest idle share possible for this work, reached if the busiest service never waits."""
        busiest = max(self.busy.values(), default=0.0)
        return {service: 1.0 - share / busiest if busiest else 0.0 for service, share in self.busy.items()}

    @property
    def overlap_bound(self) -> float:
        """(G + T) / max(G, T): the largest speed-up from overlapping generation G with training T, 1 to 2."""
        longer = max(self.generation_seconds, self.training_seconds)
        return (self.generation_seconds + self.training_seconds) / longer if longer else 1.0

    @property
    def overlap_speedup(self) -> float:
        """(G + T) / window: the speed-up over running the two one after the other. At most `overlap_bound`."""
        both = self.generation_seconds + self.training_seconds
        return both / self.seconds if self.seconds else 1.0

    @property
    def overlap_efficiency(self) -> float:
        """Share of the bound that was reached, 0 to 1."""
        return self.overlap_speedup / self.overlap_bound


def idle_ratios(spans: Sequence[Span], start: float, end: float) -> Occupancy:
    """How each service used the time between `start` and `end` (seconds since the epoch); spans are clipped to it.

    Raises ValueError if the window is empty.
    """
    if end <= start:
        raise ValueError(f"idle ratios need a window with a length, got start {start} and end {end}")
    services: dict[str, list[Interval]] = {span.service: [] for span in spans}
    stages: dict[str, list[Interval]] = {"generate": [], "update": []}
    for span in spans:
        cut = (max(span.start, start), min(span.end, end))
        if cut[0] < cut[1]:
            services[span.service].append(cut)
            stages.setdefault(method_of(span.activity), []).append(cut)
    return Occupancy(
        seconds=end - start,
        busy={service: min(union_seconds(own) / (end - start), 1.0) for service, own in sorted(services.items())},
        generation_seconds=union_seconds(stages["generate"]),
        training_seconds=union_seconds(stages["update"]),
    )


def method_of(activity: str) -> str:
    """The method in an activity's name: "policy.update#1" -> "update", "publish" -> "publish"."""
    return activity.partition("#")[0].rpartition(".")[2]


class _Event(msgspec.Struct):
    ph: str
    name: str
    pid: int
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, str | int] = {}


class _Trace(msgspec.Struct, rename="camel"):
    trace_events: list[_Event]
    other_data: dict[str, float]


def _slice(span: Span, pid: int, lane: int, origin: float) -> dict[str, Any]:
    args: Mapping[str, int] = {"rows": span.rows, "step": span.step}
    start, duration = round((span.start - origin) * 1e6, 3), round(max(span.end - span.start, 0.0) * 1e6, 3)
    return {"ph": "X", "name": span.activity, "pid": pid, "tid": lane, "ts": start, "dur": duration, "args": args}


def _encode(spans: Iterable[Span]) -> bytes:
    return b"".join(msgspec.json.encode(span) + b"\n" for span in spans)
