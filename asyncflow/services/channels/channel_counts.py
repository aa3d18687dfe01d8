"""ChannelCounts: the rows, bytes and waiting time of a service's channels, by edge."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from asyncflow.observe.exporter import Exporter
from protocols.control.delivery import EdgeStatistics


class _Edge(msgspec.Struct):
    """The counts of one edge, as in `EdgeStatistics`."""

    rows: int = 0
    refused: int = 0
    damaged: int = 0
    inline_bytes: int = 0
    read_bytes: dict[int, int] = {}
    wait_seconds: float = 0.0


class ChannelCounts:
    """Counts by edge, for the metrics endpoint and for GetStatistics."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._edges: defaultdict[str, _Edge] = defaultdict(_Edge)

    @property
    def edges(self) -> list[str]:
        """The edges with counts: channels, and direct calls."""
        return list(self._edges)

    def arrived(self, edge: str, rows: int, refused: int, inline_bytes: int, wait_seconds: float) -> None:
        """Count a delivery that a mailbox accepted."""
        counts = self._edges[edge]
        counts.rows += rows - refused
        counts.refused += refused
        counts.inline_bytes += inline_bytes
        counts.wait_seconds += wait_seconds
        self._exporter.observe("channel_wait_seconds", wait_seconds, channel=edge, side="receive")
        if refused:
            self._exporter.inc("duplicates_rejected_total", refused, channel=edge)
        if inline_bytes:
            self._exporter.inc("channel_inline_bytes_total", inline_bytes, channel=edge)

    def read(self, edge: str, rank: int, nbytes: int) -> None:
        """Count the bytes that a rank read from frames of an edge."""
        read = self._edges[edge].read_bytes
        read[rank] = read.get(rank, 0) + nbytes
        self._exporter.inc("channel_bytes_total", nbytes, channel=edge)

    def damaged(self, edge: str, rows: int) -> None:
        """Count rows whose frame could not be decoded."""
        self._edges[edge].damaged += rows
        self._exporter.inc("rows_quarantined_total", rows, channel=edge)

    def statistics(self, edge: str, depth: int, capacity: int, peak: int) -> EdgeStatistics:
        """The statistics of one edge since the service started."""
        return EdgeStatistics(
            edge=edge, depth=depth, capacity=capacity, peak=peak, **msgspec.structs.asdict(self._edges[edge])
        )
