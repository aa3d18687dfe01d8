"""Charts: axes enclose all values, long lines are thinned out, and names are escaped."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.observe.charts import (
    KIND_NAMES,
    MAX_POINTS,
    ChartLine,
    gantt,
    kind_of,
    line_chart,
    nice_ticks,
    smoothed,
    thinned,
)
from asyncflow.observe.markup import Markup, tag
from protocols.control.notices import Span

reals = st.floats(-1e30, 1e30)
points = st.lists(st.tuples(st.integers(0, 10_000).map(float), reals), min_size=1, max_size=30)


@given(reals, reals)
def test_ticks_rise_are_few_and_enclose_the_values(a: float, b: float):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    room = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + room
    assert ticks[-1] >= high - room
    assert 2 <= len(ticks) <= 7
    assert all(x < y for x, y in pairwise(ticks))


@given(points, st.booleans())
def test_any_finite_values_make_a_chart_inside_its_box(seen: list[tuple[float, float]], zero: bool):
    image = ElementTree.fromstring(line_chart([ChartLine("value", sorted(seen))], zero=zero))
    for dot in image.iter("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= 440
        assert 0 <= float(dot.attrib["cy"]) <= 170


@given(points)
def test_the_moving_mean_stays_within_the_values(seen: list[tuple[float, float]]):
    values = [y for _, y in seen]
    slack = 1e-9 * max(map(abs, values))
    assert all(min(values) - slack <= y <= max(values) + slack for _, y in smoothed(seen))


def test_a_long_line_is_thinned_to_its_ends_and_what_lies_between():
    long = [(float(i), 0.0) for i in range(100_000)]
    short = thinned(long)
    assert len(short) == MAX_POINTS
    assert (short[0], short[-1]) == (long[0], long[-1])


def test_a_bar_tells_its_activity_length_rows_and_step():
    image = ElementTree.fromstring(gantt([Span("policy", "policy.update#1", 3.0, 4.5, 256, 12)], 0.0, 5.0))
    [title] = image.iter("title")
    assert title.text == "policy.update#1, 1.5 s, 256 rows, step 12"


def test_a_bar_that_reaches_over_the_window_is_cut_at_it():
    image = ElementTree.fromstring(gantt([Span("policy", "load", -50.0, 50.0)], 0.0, 5.0))
    track, bar = image.iter("rect")
    assert (bar.attrib["x"], bar.attrib["width"]) == (track.attrib["x"], track.attrib["width"])


@pytest.mark.parametrize(
    ("activity", "kind"),
    [
        ("policy.generate#1", "generate"),
        ("critic.update#1", "train"),
        ("reference.log_probs#2", "score"),
        ("load", "weights"),
    ],
)
def test_activities_are_coloured_by_what_they_are(activity: str, kind: str):
    assert kind_of(activity) == kind
    assert kind in KIND_NAMES


def test_text_and_attributes_are_escaped_and_markup_is_not():
    made = tag("p", "<script>", tag("b", "a & b"), title='"><img>')
    assert made == '<p title="&quot;&gt;&lt;img&gt;">&lt;script&gt;<b>a &amp; b</b></p>'
    assert isinstance(made, Markup)
