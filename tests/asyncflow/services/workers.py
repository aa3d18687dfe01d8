"""Worker classes of the test services. Their arithmetic is simple enough to check every row by its id."""

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

PATIENCE_SECONDS = 60.0


def process_of(folder: Path, service: str, rank: int = 0) -> int:
    """The process id of a Doubler whose `folder` option is this folder."""
    return int((folder / f"{service}-{rank}.pid").read_text())


class Doubler:
    """Doubles its input.

    With the option `folder` it writes its process id there; with `gate` it waits before each call until that file
    exists in the folder.
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
            _wait(self._gate.exists, f"{self._gate} to exist")
        return replace(rows, log_probs=rows.log_probs.with_values(2 * rows.log_probs.values))

    @stage(protocol="DP_PROTO")
    def add(self, left: LogProbs, right: LogProbs) -> LogProbs:
        """The sum of two inputs, which must hold the same rows in the same order."""
        assert left.sample_ids.tolist() == right.sample_ids.tolist()
        return replace(left, log_probs=left.log_probs.with_values(left.log_probs.values + right.log_probs.values))

    @stage(protocol="DP_PROTO")
    def refuse_odd(self, rows: LogProbs) -> LogProbs | Partial[LogProbs]:
        """Rows with odd ids fail; the others are returned unchanged."""
        odd = [Failure(sample, "odd") for sample in rows.sample_ids.tolist() if sample % 2]
        return Partial(take(rows, np.flatnonzero(rows.sample_ids % 2 == 0)), odd)

    @stage(protocol="DP_PROTO")
    def lose_first(self, rows: LogProbs) -> LogProbs:
        """A faulty method: it returns neither a value nor a failure for its first row."""
        return take(rows, np.arange(1, len(rows)))

    @stage(protocol="METRIC")
    def count(self, rows: LogProbs) -> Metrics:
        """The mean id of the rows, weighted by their number."""
        return Metrics(values={"id": float(rows.sample_ids.mean())}, counts={"id": float(len(rows))})


class Keeper:
    """The last service of a pipeline: reports the rows of a closed batch as metrics."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        pass

    @stage(protocol="RANK_ZERO")
    def keep(self, rows: LogProbs) -> Measured[LogProbs]:
        """Metrics: sample id -> its value, which must be the same for all tokens of the row."""
        for values in rows.log_probs:
            assert (values == values[0]).all()
        by_sample = {str(s): float(v[0]) for s, v in zip(rows.sample_ids.tolist(), rows.log_probs, strict=True)}
        return Measured(rows, Metrics(values=by_sample))


def _wait(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_SECONDS:g} s for {what}")
        time.sleep(0.005)
