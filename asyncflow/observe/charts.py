"""Charts as inline SVG: pure functions from numbers to markup.

Colours and fonts come from the page's style sheet through classes, so one image works on light and dark backgrounds.

Why not plotly: the report is one file that opens without network and without script, and its content security policy
forbids both. A plotly figure needs several megabytes of JavaScript in every report, and its SVG export a browser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.timeline import lanes_of, method_of
from protocols.control.notices import Span

Point = tuple[float, float]  # (step, value)

MAX_POINTS = 400  # per line: more can't be distinguished at this width
FEW_POINTS = 12  # up to this many, points have visible dots; otherwise a dot appears under the pointer
MAX_SPANS = 4000  # per Gantt chart: with more a browser can't scroll the page

_KINDS = {
    "generate": "generate",
    "update": "train",
    "publish": "weights",
    "load": "weights",
    "to_generation": "switch",
    "to_training": "switch",
    "checkpoint": "checkpoint",
}
KIND_NAMES = {
    "generate": "generating",
    "score": "scoring",
    "train": "training",
    "weights": "publishing and loading weights",
    "switch": "switching layouts",
    "checkpoint": "checkpoint",
}


class ChartLine(msgspec.Struct, frozen=True):
    """One line of a chart: points with finite values, by step."""

    name: str
    points: list[Point]
    style: str = "main"  # class of the style sheet: main, faint, second


def kind_of(activity: str) -> str:
    """The kind of an activity, a key of KIND_NAMES. Stages that are not listed count as scoring."""
    return _KINDS.get(method_of(activity), "score")


def line_chart(lines: Sequence[ChartLine], *, width: int = 440, height: int = 170, zero: bool = False) -> Markup:
    """Lines over steps, with at least one point. `zero`: the value axis starts at 0."""
    left, right, top, bottom = 46, 12, 10, 22
    points = [point for line in lines for point in line.points]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    ticks = nice_ticks(
        min(0.0, *(y for _, y in points)) if zero else min(y for _, y in points), max(y for _, y in points)
    )
    y0, y1 = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        across = (point[0] - x0) / (x1 - x0) if x1 > x0 else 0.5
        return left + across * (width - left - right), height - bottom - (point[1] - y0) / (y1 - y0) * (
            height - top - bottom
        )

    parts: list[str] = []
    for tick in ticks:
        _, y = place((x0, tick))
        parts.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", number(tick), x=left - 6, y=y + 3.5, class_="axis end"))
    for step in sorted({x0, x1}):
        x, _ = place((step, y0))
        anchor = "axis middle" if x0 == x1 else "axis" if step == x0 else "axis end"
        parts.append(tag("text", f"step {step:g}", x=x, y=height - 6, class_=anchor))
    for line in lines:
        parts.extend(_line(line, placed=[(point, place(point)) for point in thinned(line.points)]))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", class_="chart")


def _line(line: ChartLine, placed: Sequence[tuple[Point, Point]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for _, (x, y) in placed)
    dot = f"dot {line.style} shown" if len(placed) <= FEW_POINTS else f"dot {line.style}"
    parts: list[str] = [tag("polyline", points=path, class_=f"line {line.style}")]
    for (step, value), (x, y) in placed:
        title = tag("title", f"step {step:g}: {line.name} {number(value)}")
        parts.append(tag("circle", title, cx=round(x, 1), cy=round(y, 1), r=3.5, class_=dot))
    return parts


class _Window(msgspec.Struct, frozen=True):
    """Maps an interval of time (seconds) to an interval of the image."""

    start: float
    end: float
    left: float
    width: float

    def x(self, at: float) -> float:
        """The position of a time; a time outside the window is on its edge."""
        inside = min(max(at, self.start), self.end)
        return self.left + (inside - self.start) / (self.end - self.start) * self.width


def gantt(spans: Sequence[Span], start: float, end: float, *, width: int = 960) -> Markup:
    """The activities between `start` and `end` (seconds): a row per service, more lanes where its spans overlap."""
    top, lane_height = 20, 14
    window = _Window(start, end, left=128, width=width - 140)
    shown = [span for span in spans if span.end > start and span.start < end][-MAX_SPANS:]
    parts: list[str] = []
    y = top
    for service in sorted({span.service for span in shown}):
        lanes = lanes_of(span for span in shown if span.service == service)
        height = len(lanes) * lane_height
        parts.append(tag("rect", x=window.left, y=y, width=window.width, height=height, class_="track"))
        parts.append(tag("text", service, x=window.left - 10, y=y + height / 2 + 4, class_="service end"))
        for lane, own in enumerate(lanes):
            parts.extend(_bar(span, window, y + lane * lane_height + 1, lane_height - 2) for span in own)
        y += height + 8
    marks = _step_marks(shown, window, top, y)
    return tag(
        "svg", *marks, *parts, *_time_axis(window, y), viewBox=f"0 0 {width} {y + 18}", role="img", class_="chart"
    )


def _bar(span: Span, window: _Window, y: float, height: float) -> Markup:
    about = [span.activity, f"{span.end - span.start:.3g} s"]
    about += [f"{span.rows} rows"] if span.rows else []
    about += [f"step {span.step}"] if span.step >= 0 else []
    x = window.x(span.start)
    width = max(window.x(span.end) - x, 1.0)
    title = tag("title", ", ".join(about))
    return tag("rect", title, x=x, y=y, width=width, height=height, rx=1.5, class_=f"bar {kind_of(span.activity)}")


def _step_marks(spans: Sequence[Span], window: _Window, top: float, bottom: float) -> list[str]:
    """A line at the end of each step's last training."""
    ends: dict[int, float] = {}
    for span in spans:
        if span.step >= 0 and method_of(span.activity) == "update" and span.end <= window.end:
            ends[span.step] = max(ends.get(span.step, span.end), span.end)
    parts: list[str] = []
    for step, at in sorted(ends.items()):
        x = window.x(at)
        parts.append(tag("line", x1=x, x2=x, y1=top - 6, y2=bottom, class_="mark"))
        parts.append(tag("text", f"step {step}", x=x - 3, y=top - 8, class_="axis end"))
    return parts


def _time_axis(window: _Window, y: float) -> list[str]:
    seconds = window.end - window.start
    ticks = [tick for tick in nice_ticks(0.0, seconds, count=6) if tick <= seconds]
    return [tag("text", f"{number(t)} s", x=window.x(window.start + t), y=y + 12, class_="axis middle") for t in ticks]


def idle_bars(idle: Mapping[str, float], bounds: Mapping[str, float], *, width: int = 960) -> Markup:
    """Idle share per service, 0 to 1, with a mark at the smallest share that this work allows."""
    left, right, row = 128, 190, 26
    scale = width - left - right
    parts: list[str] = []
    for index, (service, share) in enumerate(sorted(idle.items())):
        y, bound = index * row + 4, bounds[service]
        title = tag(
            "title", f"{service}: idle {share:.1%} of the time, at least {bound:.1%} however well stages overlap"
        )
        parts += [
            tag("text", service, x=left - 10, y=y + 13, class_="service end"),
            tag("rect", x=left, y=y, width=scale, height=18, rx=2, class_="track"),
            tag("rect", title, x=left, y=y, width=max(share * scale, 1.0), height=18, rx=2, class_="bar idle"),
            tag("line", x1=left + bound * scale, x2=left + bound * scale, y1=y - 3, y2=y + 21, class_="bound"),
            tag("text", f"idle {share:.0%}, bound {bound:.0%}", x=left + scale + 12, y=y + 13, class_="service"),
        ]
    return tag("svg", *parts, viewBox=f"0 0 {width} {max(len(idle), 1) * row + 4}", role="img", class_="chart")


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Moving mean over a centred window of about a tenth of the points, which shows the trend."""
    reach = len(points) // 20
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [(step, sum(y for _, y in window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` evenly spaced points, including the last one."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that enclose low and high; their distance is 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):  # flat, as far as a float can tell
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short form for display: 12,345 and 0.0312 and 3e-05."""
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
