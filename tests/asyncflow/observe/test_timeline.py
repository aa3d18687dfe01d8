"""The timeline is bounded, valid for Perfetto, and adds up busy and idle time correctly."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.observe.timeline import Timeline, idle_ratios, lanes_of, method_of, read_spans, trace_of, union_seconds
from protocols.control.notices import Span

ticks = st.integers(0, 40)
intervals = st.lists(st.tuples(ticks, st.integers(0, 12)).map(lambda t: (float(t[0]), float(t[0] + t[1]))), max_size=12)
spans = st.lists(
    st.builds(
        lambda service, activity, start, length: Span(service, activity, start, start + length),
        st.sampled_from(["policy", "critic", "generator"]),
        st.sampled_from(["policy.generate#1", "policy.update#1", "critic.update#1", "reward.score#2", "load"]),
        ticks.map(float),
        st.integers(0, 12).map(float),
    ),
    max_size=15,
)


def span(start: float, end: float, service: str = "policy", activity: str = "policy.update#1") -> Span:
    return Span(service, activity, start, end)


@given(intervals)
def test_the_union_is_what_counting_every_unit_of_time_gives(cuts: list[tuple[float, float]]):
    covered = sum(any(a <= unit and unit + 1 <= b for a, b in cuts) for unit in range(60))
    assert union_seconds(cuts) == covered


@given(spans, ticks, st.integers(1, 30))
def test_shares_lie_between_none_and_all_and_the_bounds_hold(seen: list[Span], start: int, length: int):
    use = idle_ratios(seen, start, start + length)
    assert set(use.busy) == {s.service for s in seen}
    for service, share in use.busy.items():
        assert 0.0 <= share <= 1.0
        assert use.idle[service] == pytest.approx(1.0 - share)
        assert use.idle_bounds[service] <= use.idle[service] + 1e-9
    assert 1.0 <= use.overlap_bound <= 2.0
    assert use.overlap_speedup <= use.overlap_bound + 1e-9
    assert 0.0 <= use.overlap_efficiency <= 1.0 + 1e-9


@given(spans)
def test_lanes_hold_every_span_once_without_overlap_and_no_lane_is_needless(seen: list[Span]):
    lanes = lanes_of(seen)
    assert sorted(map(repr, seen)) == sorted(repr(s) for lane in lanes for s in lane)
    for lane in lanes:
        assert all(a.end <= b.start for a, b in pairwise(lane))
    busiest = max((sum(s.start <= unit and unit + 1 <= s.end for s in seen) for unit in range(60)), default=0)
    assert len(lanes) <= busiest + sum(s.start == s.end for s in seen)


def test_overlapping_spans_of_a_service_count_once_and_are_cut_at_the_window():
    seen = [span(-5, 2), span(1, 4), span(8, 30), span(0, 10, "critic", "critic.values#1")]
    use = idle_ratios(seen, 0, 10)
    assert use.busy == {"critic": 1.0, "policy": pytest.approx(0.6)}


def test_the_bound_is_that_of_generation_and_training_alone():
    seen = [
        span(0, 6, "generator", "policy.generate#1"),
        span(4, 6, "generator", "policy.generate#2"),
        span(6, 9, "policy", "policy.update#1"),
        span(7, 10, "critic", "critic.update#1"),
        span(0, 10, "reward", "reward.score#1"),
    ]
    use = idle_ratios(seen, 0, 10)
    assert (use.generation_seconds, use.training_seconds) == (6, 4)
    assert use.overlap_bound == pytest.approx(10 / 6)
    assert use.overlap_speedup == pytest.approx(1.0)  # one after the other: no speed-up
    assert use.overlap_efficiency == pytest.approx(0.6)


def test_a_window_without_length_is_refused():
    with pytest.raises(ValueError, match="start 5 and end 5"):
        idle_ratios([], 5, 5)


def test_an_activity_names_its_method():
    assert [method_of(a) for a in ("policy.update#1", "publish", "critic.update")] == ["update", "publish", "update"]


def test_the_trace_is_what_perfetto_reads_with_a_track_group_for_each_service():
    seen = [span(100.0, 101.5), span(101.0, 102.0), Span("critic", "critic.update#1", 100.25, 100.75, 8, 3)]
    events = json.loads(json.dumps(trace_of(seen)))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["critic", "policy"]
    [update] = [e for e in events if e["ph"] == "X" and names[e["pid"]] == "critic"]
    assert (update["ts"], update["dur"], update["args"]) == (250_000.0, 500_000.0, {"rows": 8, "step": 3})
    tracks = [e["tid"] for e in events if e["ph"] == "X" and names[e["pid"]] == "policy"]
    assert tracks == [0, 1]  # they overlap, so they need two devices


@given(spans)
def test_spans_come_back_from_the_trace(tmp_path_factory: pytest.TempPathFactory, seen: list[Span]):
    folder = tmp_path_factory.mktemp("run")
    timeline = Timeline(folder / "timeline.jsonl")
    timeline.add(seen)
    back = read_spans(timeline.write(folder / "timeline.json"))
    timeline.close()
    assert sorted(map(repr, back)) == sorted(map(repr, seen))


def test_memory_and_journal_stay_bounded(tmp_path: Path):
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path, keep=10)
    for i in range(95):
        timeline.add([span(i, i + 1)])
        assert len(timeline.spans) <= 10
        assert len(path.read_bytes().splitlines()) <= 20
    assert timeline.spans[-1].start == 94
    timeline.close()


def test_a_restart_reads_back_what_a_crash_left(tmp_path: Path):
    path = tmp_path / "timeline.jsonl"
    timeline = Timeline(path)
    timeline.add([span(0, 1), span(1, 2)])
    timeline.close()
    path.write_bytes(path.read_bytes()[:-5])
    resumed = Timeline(path)
    resumed.add([span(5, 6)])
    assert [s.start for s in resumed.spans] == [0, 5]
    resumed.close()
    assert len(path.read_bytes().splitlines()) == 2


def test_a_timeline_that_keeps_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep=0"):
        Timeline(tmp_path / "timeline.jsonl", keep=0)
