"""Workers of the tests' own services: what they do to a row can be told from the row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from asyncflow.services.ranks.spec import CustomSettings, ServiceSpec
from protocols.data.columns import take
from protocols.data.messages import LogProbs, Metrics
from protocols.stage import Failure, Measured, Partial, stage

PATIENCE_SECONDS = 30.0


def process_of(folder: Path, service: str, rank: int = 0) -> int:
    """The process in which a Doubler that was given this folder works."""
    return int((folder / f"{service}-{rank}.pid").read_text())


class Doubler:
    """Doubles what it gets.

    `options` of its service may give a `folder`, where it says which process it is, and a `gate` there: a file
    without which it doesn't go to work.
    """

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        assert isinstance(spec.settings, CustomSettings)
        options = spec.settings.options
        folder = Path(options.get("folder", ""))
        self._gate = folder / options["gate"] if "gate" in options else None
        if "folder" in options:
            (folder / f"{spec.name}-{rank}.pid").write_text(str(os.getpid()))

    @stage(protocol="DP_PROTO")
    def double(self, rows: LogProbs) -> LogProbs:
        """Twice the values."""
        if self._gate is not None:
            _wait(self._gate.exists, f"{self._gate} to be there")
        return replace(rows, log_probs=rows.log_probs.with_values(2 * rows.log_probs.values))

    @stage(protocol="DP_PROTO")
    def add(self, left: LogProbs, right: LogProbs) -> LogProbs:
        """The sum of two inputs, which have to be of the same rows."""
        assert left.sample_ids.tolist() == right.sample_ids.tolist()
        return replace(left, log_probs=left.log_probs.with_values(left.log_probs.values + right.log_probs.values))

    @stage(protocol="DP_PROTO")
    def refuse_odd(self, rows: LogProbs) -> LogProbs | Partial[LogProbs]:
        """Rows of odd ids fail."""
        odd = [Failure(sample, "odd") for sample in rows.sample_ids.tolist() if sample % 2]
        return Partial(take(rows, np.flatnonzero(rows.sample_ids % 2 == 0)), odd)

    @stage(protocol="DP_PROTO")
    def lose_first(self, rows: LogProbs) -> LogProbs:
        """A worker with a fault: its first row vanishes."""
        return take(rows, np.arange(1, len(rows)))

    @stage(protocol="METRIC")
    def count(self, rows: LogProbs) -> Metrics:
        """The mean id of its rows, with their number as its weight."""
        return Metrics(values={"id": float(rows.sample_ids.mean())}, counts={"id": float(len(rows))})


class Keeper:
    """The end of a chain: the closed batch's rows, told as measurements."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        pass

    @stage(protocol="RANK_ZERO")
    def keep(self, rows: LogProbs) -> Measured[LogProbs]:
        """Sample id -> its value, which is the same for each of a row's tokens."""
        for values in rows.log_probs:
            assert (values == values[0]).all()
        told = {str(s): float(v[0]) for s, v in zip(rows.sample_ids.tolist(), rows.log_probs, strict=True)}
        return Measured(rows, Metrics(values=told))


def _wait(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS:g} s for {what}")
        time.sleep(0.005)
