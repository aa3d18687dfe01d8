"""The Prometheus endpoint of one actor: the metrics of one table, a bounded number of label values, a port of its own.

actor: exporter.inc("tokens_generated_total", 812)  ->  registry  <-  GET /metrics  <-  Prometheus
"""

from __future__ import annotations

import functools
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client import Metric as Family

from asyncflow.observe.journal import replace_file
from asyncflow.observe.memory import STATM, resident_bytes
from asyncflow.observe.metrics import IDENTITY, METRICS, Kind, Metric, metric

MAX_LABEL_VALUES = 64  # per label and metric; further values are counted as OTHER
OTHER = "other"


class ScrapeTarget(msgspec.Struct, frozen=True):
    """The address of one actor's metrics, for Prometheus service discovery."""

    address: str  # "host:port"
    role: str
    rank: int
    run: str


class Exporter:
    """One actor's metrics and their endpoint. Any thread may record; a series exists once it has a value.

    Every series has the labels `role` and `rank`. A metric that lists `role` among its own labels (the controller
    reports about its services) uses the role given with the value, by default this actor's.
    """

    def __init__(self, role: str, rank: int = 0) -> None:
        self.role = role
        self.rank = rank
        self._registry = _Registry()
        self._instruments = {name: _instrument(row, self._registry) for name, row in METRICS.items()}
        self._seen: dict[tuple[str, str], set[str]] = {}
        self._lock = threading.Lock()
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self.set("up", 1)
        self.set("build_info", 1, version=_program_version(), python=platform.python_version())
        self.set("start_time_seconds", time.time())
        if STATM.exists():
            self._gauge("resident_memory_bytes").set_function(resident_bytes)

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        """Increase a counter. Raises KeyError for an unknown metric, ValueError for another kind or other labels."""
        instrument = self._series(name, "counter", labels)
        assert isinstance(instrument, Counter)
        instrument.inc(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge. Raises like `inc`."""
        self._gauge(name, **labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram. Raises like `inc`."""
        instrument = self._series(name, "histogram", labels)
        assert isinstance(instrument, Histogram)
        instrument.observe(value)

    def serve(self, host: str = "127.0.0.1") -> int:
        """Serve GET /metrics on a free port of `host`, from a new thread, until `close`. Returns the port."""
        if self._server is not None:
            raise RuntimeError(
                f"{self.role}.{self.rank} already serves its metrics on port {self._server[0].server_port}"
            )
        self._server = start_http_server(0, host, self._registry)
        return self._server[0].server_port

    def close(self) -> None:
        """Free the port and end the thread. May be called twice."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    def _gauge(self, name: str, **labels: str) -> Gauge:
        instrument = self._series(name, "gauge", labels)
        assert isinstance(instrument, Gauge)
        return instrument

    def _series(self, name: str, kind: Kind, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        row = metric(name)
        if row.kind != kind:
            raise ValueError(f"{name} is a {row.kind}, used as a {kind}")
        given = {"role": self.role, **labels} if "role" in row.labels else labels
        if set(given) != set(row.labels):
            raise ValueError(f"{name} takes the labels {sorted(row.labels)}, got {sorted(labels)}")
        own = {label: self._bounded(name, label, value) for label, value in given.items()}
        return self._instruments[name].labels(**{"role": self.role, "rank": str(self.rank), **own})

    def _bounded(self, metric_name: str, label: str, value: str) -> str:
        """The label value, or OTHER after MAX_LABEL_VALUES others, so that a faulty caller can't flood the server."""
        with self._lock:
            seen = self._seen.setdefault((metric_name, label), set())
            if value not in seen and len(seen) >= MAX_LABEL_VALUES:
                return OTHER
            seen.add(value)
            return value


def write_targets(path: Path, targets: Iterable[ScrapeTarget]) -> None:
    """Write the file of Prometheus file discovery atomically, so that a server always reads a complete file.

    The target's labels repeat those of its series, so scrape with `honor_labels: true`; otherwise the role that the
    controller reports about another service is renamed to `exported_role`.
    """
    entries = [{"targets": [t.address], "labels": {"role": t.role, "rank": str(t.rank), "run": t.run}} for t in targets]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, msgspec.json.format(msgspec.json.encode(entries), indent=2) + b"\n")


class _Registry(CollectorRegistry):
    """Omits the `_created` series of counters and histograms, which double the number of series and are not used.

    The client library's own switch for this is global to the process, which other libraries share.
    """

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _instrument(row: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = (*IDENTITY, *(label for label in row.labels if label not in IDENTITY))
    if row.kind == "histogram":
        return Histogram(row.full_name, row.help, labels, buckets=row.buckets, registry=registry)
    kind = Counter if row.kind == "counter" else Gauge
    return kind(row.full_name, row.help, labels, registry=registry)


@functools.cache
def _program_version() -> str:
    try:
        return version("asyncflow")
    except PackageNotFoundError:  # run from a checkout
        return "0+checkout"
