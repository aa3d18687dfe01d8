"""Speeds from a run's spans: corrected for shared cores, with a linear fit for each kind of call."""

from __future__ import annotations

import pytest

from asyncflow.planner.calibration.measured_speeds import own_work, speeds_of
from protocols.control.notices import Span


def span(start: float, end: float, service: str = "policy", activity: str = "policy.update#1", rows: int = 0) -> Span:
    return Span(service, activity, start, end, rows)


def test_a_span_that_shared_a_core_was_half_as_much_work():
    both = [span(0, 4), span(0, 4, "critic"), span(4, 6)]
    assert own_work(both, cores=1) == pytest.approx([2, 2, 2])
    assert own_work(both, cores=2) == pytest.approx([4, 4, 2])
    assert own_work(both, cores=0) == pytest.approx([4, 4, 2])


def test_overlap_in_part_is_counted_in_part():
    assert own_work([span(0, 4), span(2, 6)], cores=1) == pytest.approx([3, 3])
    assert own_work([span(0, 3), span(0, 3), span(0, 3)], cores=1.5) == pytest.approx([1.5] * 3)
    assert own_work([], cores=1) == []


def test_each_kind_of_call_has_its_own_line():
    spans = [
        span(10 * n, 10 * n + 1 + 0.1 * rows, "critic", "critic.values#1", rows) for n, rows in enumerate((2, 4, 8))
    ]
    spans += [span(100, 105, "critic", "critic.update#1", 16), span(200, 208, "policy", "generate")]
    spans += [span(300, 300.5, "policy", "publish"), span(310, 311, "generator", "load")]
    speeds = speeds_of(spans, ["critic", "policy", "generator", "advantage"], cores=0, tokens_per_span=16)
    assert speeds["critic"].forward_s([0] * 8) == pytest.approx(1.8)
    assert speeds["critic"].update_s([0] * 16) == pytest.approx(5)
    assert speeds["policy"].decode_s(4, 100) == pytest.approx(0.5)
    assert (speeds["policy"].publish_s, speeds["generator"].publish_s) == (pytest.approx(0.5), pytest.approx(1))
    assert speeds["advantage"].forward_s([0]) == 0
