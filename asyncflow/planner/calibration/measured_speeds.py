"""Measured speeds of a run's services: linear fits over its spans, corrected for shared cores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from asyncflow.observe.timeline import method_of
from asyncflow.planner.calibration.calibration import LinearFit, fit
from protocols.control.notices import Span

NOTHING = LinearFit(0.0, 0.0)


class MeasuredSpeed(msgspec.Struct, frozen=True):
    """The speed of a service from its measured calls; without any, a call takes no time. Implements `Speed`."""

    forward: LinearFit = NOTHING  # over rows
    update: LinearFit = NOTHING  # over rows
    step_s: float = 0.0  # of a decoding step of the engine, however many sequences run
    engines: int = 1
    slots: int = 1 << 30
    switch_s: float = 0.0
    publish_s: float = 0.0

    def forward_s(self, lengths: Sequence[int]) -> float:
        return self.forward.at(len(lengths))

    def update_s(self, lengths: Sequence[int]) -> float:
        return self.update.at(len(lengths))

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """0: the measured decoding steps include it."""
        return 0.0

    def decode_s(self, running: float, context: float) -> float:
        return self.step_s


def own_work(spans: Sequence[Span], cores: float) -> list[float]:
    """Seconds that each span would have taken alone, if n spans on c cores advance at min(1, c/n) each.

    `cores` 0 means that they did not share cores.
    """
    if not cores or not spans:
        return [span.end - span.start for span in spans]
    starts, ends = (np.array([getattr(span, name) for span in spans]) for name in ("start", "end"))
    moments = np.unique(np.concatenate([starts, ends]))
    running = np.searchsorted(np.sort(starts), moments[:-1], "right") - np.searchsorted(
        np.sort(ends), moments[:-1], "right"
    )
    rates = np.minimum(1.0, cores / np.maximum(running, 1))
    progress = np.concatenate([[0.0], np.cumsum(np.diff(moments) * rates)])
    return (np.interp(ends, moments, progress) - np.interp(starts, moments, progress)).tolist()


def speeds_of(
    spans: Sequence[Span], services: Sequence[str], cores: float, tokens_per_span: float
) -> dict[str, MeasuredSpeed]:
    """The speed of every service, from the spans of steady steps.

    Args:
        tokens_per_span: tokens that one `generate` span generates for each sequence.
    """
    work: Mapping[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for span, seconds in zip(spans, own_work(spans, cores), strict=True):
        work[span.service, method_of(span.activity)].append((span.rows, max(seconds, 1e-9)))

    def seconds_of(service: str, method: str) -> float:
        calls = [seconds for _, seconds in work.get((service, method), [])]
        return float(np.median(calls)) if calls else 0.0

    speeds = {}
    for service in services:
        inference = [
            call
            for (who, method), calls in work.items()
            if who == service and method not in NOT_INFERENCE
            for call in calls
        ]
        speeds[service] = MeasuredSpeed(
            forward=_linear_fit(inference),
            update=_linear_fit(work.get((service, "update"), [])),
            step_s=seconds_of(service, "generate") / tokens_per_span,
            publish_s=max(seconds_of(service, "publish"), seconds_of(service, "load")),
        )
    return speeds


NOT_INFERENCE = frozenset(
    ("update", "generate", "submit", "follow", "publish", "load", "checkpoint", "export", "restore", "start",
     "to_generation", "to_training")
)  # fmt: skip


def _linear_fit(calls: Sequence[tuple[int, float]]) -> LinearFit:
    known = [(rows, seconds) for rows, seconds in calls if rows > 0]
    return fit([rows for rows, _ in known], [seconds for _, seconds in known]) if known else NOTHING
