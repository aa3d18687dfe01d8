"""report.html: learning curves, use of time and final states of the samples of a run, in one file.

Everything is read from the run folder, even if the run failed halfway.
"""

from __future__ import annotations

import sqlite3
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncflow.observe.charts import KIND_NAMES, gantt, idle_bars, number, smoothed
from asyncflow.observe.curves import Row, learning_curves, points_of
from asyncflow.observe.journal import read_lines, replace_file
from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.page import page, section
from asyncflow.observe.sentences import sentence
from asyncflow.observe.texts import texts_section
from asyncflow.observe.timeline import Occupancy, idle_ratios, read_spans
from protocols.control.events import RunEnded
from protocols.control.notices import Span

Totals = Mapping[tuple[str, str], int]  # (state, reason) -> samples

GANTT_STEPS = 4  # number of last steps in the Gantt chart
GANTT_SECONDS = 60.0  # its length if no span has a step


def write_report(folder: Path, totals: Totals | None = None, ended: RunEnded | None = None) -> Path:
    """Write `folder`/report.html and return its path; a section whose file is missing says so.

    `totals` are the samples by final state, by default read from the run's ledger.db; `ended` is the run's end. Raises
    msgspec.DecodeError, tomllib.TOMLDecodeError or sqlite3.Error for a broken file.
    """
    recipe_path, timeline_path = folder / "recipe.toml", folder / "timeline.json"
    recipe = recipe_path.read_text() if recipe_path.exists() else ""
    page = report_page(
        name=str(tomllib.loads(recipe).get("name", folder.name)),
        recipe=recipe,
        steps=read_lines(folder / "metrics.jsonl"),
        evaluations=read_lines(folder / "evaluations.jsonl"),
        texts=read_lines(folder / "samples.jsonl"),
        spans=read_spans(timeline_path) if timeline_path.exists() else [],
        totals=totals if totals is not None else ledger_totals(folder / "ledger.db"),
        end=(sentence(ended, 0) or "") if ended is not None else "",
    )
    return replace_file(folder / "report.html", page.encode())


def ledger_totals(path: Path) -> dict[tuple[str, str], int]:
    """Samples by (state, reason) in a ledger; empty without a ledger."""
    if not path.exists():
        return {}
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        known = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'samples'").fetchone()
        query = "SELECT state, coalesce(reason, ''), count(*) FROM samples GROUP BY 1, 2"
        rows = connection.execute(query).fetchall() if known else []
    finally:
        connection.close()
    return {(str(state), str(reason)): int(count) for state, reason, count in rows}


def report_page(
    *,
    name: str,
    recipe: str,
    steps: Sequence[Row],
    evaluations: Sequence[Row],
    spans: Sequence[Span],
    totals: Totals,
    texts: Sequence[Row] = (),
    end: str = "",
) -> Markup:
    """The page, from the contents of the run folder; `texts`: samples.jsonl; `end` says how the run ended."""
    no_timeline = _absent("The run left no timeline.json.")
    main = [
        tag("h1", name),
        tag("p", _subtitle(recipe, steps), class_="muted"),
        *([tag("p", f"The {end}.", class_="muted")] if end else []),
        _tiles(steps, evaluations, totals),
        section("Learning", *learning_curves(steps, evaluations)),
        section("The last steps", *(_last_steps(spans) if spans else [no_timeline])),
        section("Idle time", *(_idle(spans) if spans else [no_timeline])),
        section("Samples", *_samples(totals)),
        texts_section(texts),
        section("Details", *_details(recipe, steps)),
    ]
    return page(f"{name}: run report", main)


def _absent(what: str) -> Markup:
    return tag("p", what, class_="muted")


def _subtitle(recipe: str, steps: Sequence[Row]) -> str:
    facts = tomllib.loads(recipe)
    parts = [f"algorithm {facts['algorithm']}"] if "algorithm" in facts else []
    if steps:
        last, minutes = steps[-1], sum(row["seconds"] or 0.0 for row in steps) / 60
        parts += [f"{last['step']:,} steps", f"{number(round(minutes, 1))} minutes", f"weights {last['version']}"]
    return ", ".join(parts) or "No step was committed."


def _tiles(steps: Sequence[Row], evaluations: Sequence[Row], totals: Totals) -> Markup:
    tiles: list[Markup] = []
    rewards = points_of(steps, "reward_mean")
    if rewards:
        trend = smoothed(rewards)
        tiles.append(_tile("Reward", _short(trend[-1][1]), f"from {_short(trend[0][1])}"))
    for metric in sorted({str(row["metric"]) for row in evaluations}):
        points = points_of([row for row in evaluations if row["metric"] == metric], "value")
        if points:
            tiles.append(_tile(f"Held-out {metric}", _short(points[-1][1]), f"from {_short(points[0][1])}"))
    seconds = sum(row["seconds"] or 0.0 for row in steps)
    if seconds:
        tokens = sum(row["tokens_generated"] for row in steps)
        tiles.append(_tile("Tokens trained", f"{tokens:,}", f"{number(round(tokens / seconds))} per second"))
    if steps:
        tiles.append(_tile("Largest staleness", number(max(row["staleness_max"] for row in steps)), "versions"))
    if totals:
        trained = sum(count for (state, _), count in totals.items() if state == "trained")
        tiles.append(_tile("Samples trained", f"{trained:,}", f"of {sum(totals.values()):,}"))
    return tag("div", *tiles, class_="tiles")


def _tile(label: str, value: str, note: str) -> Markup:
    return tag("div", tag("small", label), tag("strong", value), tag("small", note), class_="tile")


def _last_steps(spans: Sequence[Span]) -> list[Markup]:
    start, end = gantt_window(spans)
    legend = [tag("span", tag("i", class_=f"key {kind}"), label) for kind, label in KIND_NAMES.items()]
    note = (
        "Each bar is one call, in seconds from the left edge; a dashed line is the end of a step's training. "
        "Hold the pointer over a bar for its rows. More of the run is in timeline.json, for ui.perfetto.dev."
    )
    return [
        tag("p", *legend, class_="legend"),
        tag("div", gantt(spans, start, end), class_="wide"),
        tag("p", note, class_="muted"),
    ]


def gantt_window(spans: Sequence[Span]) -> tuple[float, float]:
    """Start and end of the last GANTT_STEPS steps, or of the last GANTT_SECONDS if no span has a step."""
    end = max(span.end for span in spans)
    last = max(span.step for span in spans)
    since = [span.start for span in spans if span.step > max(last - GANTT_STEPS, -1)]
    start = min(since) if since else max(min(span.start for span in spans), end - GANTT_SECONDS)
    return (start, end) if end > start else (start, start + 1.0)


def _idle(spans: Sequence[Span]) -> list[Markup]:
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    use = idle_ratios(spans, start, max(end, start + 1e-6))
    return [
        tag("div", idle_bars(use.idle, use.idle_bounds), class_="wide"),
        tag("p", *_overlap_text(use), class_="muted"),
    ]


def _overlap_text(use: Occupancy) -> list[str]:
    longest = max(use.busy, key=lambda service: use.busy[service])
    generation, training = (number(round(s, 1)) for s in (use.generation_seconds, use.training_seconds))
    return [
        f"Over {number(round(use.seconds, 1))} s. The mark is the least idle share that this work allows: {longest} ",
        "was the busiest service, and the others can't work more than it leaves them to do. ",
        f"Generating took {generation} s and training {training} s; overlapping them can be at most ",
        f"{use.overlap_bound:.2f} times as fast as one after the other, and this run was ",
        f"{use.overlap_speedup:.2f} times as fast, {use.overlap_efficiency:.0%} of that.",
    ]


def _samples(totals: Totals) -> list[Markup]:
    if not totals:
        return [_absent("The run left no ledger of samples.")]
    everything = sum(totals.values())
    titles = [tag("th", title) for title in ("state", "reason")]
    titles += [tag("th", title, class_="number") for title in ("samples", "share")]
    rows = [
        tag("tr", tag("td", state), tag("td", reason or "-"), _cell(f"{count:,}"), _cell(f"{count / everything:.2%}"))
        for (state, reason), count in sorted(totals.items(), key=lambda item: -item[1])
    ]
    foot = tag("tr", tag("th", "all"), tag("td"), _cell(f"{everything:,}"), tag("td"))
    return [tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *rows), tag("tfoot", foot))]


def _details(recipe: str, steps: Sequence[Row]) -> list[Markup]:
    names = sorted({name for row in steps for name, value in row.items() if isinstance(value, (int, float))} - {"step"})
    head = tag(
        "tr", tag("th", "metric"), *(tag("th", title, class_="number") for title in ("first", "last", "least", "most"))
    )
    rows = [
        tag("tr", tag("td", name), *(_cell(number(v)) for v in (values[0], values[-1], min(values), max(values))))
        for name in names
        if (values := [value for _, value in points_of(steps, name)])
    ]
    metrics = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")
    return [
        tag("details", tag("summary", "Every metric"), metrics),
        tag("details", tag("summary", "The recipe"), tag("pre", recipe or "The run left no recipe.toml.")),
    ]


def _cell(text: str) -> Markup:
    return tag("td", text, class_="number")


def _short(value: float) -> str:
    return number(round(value, 3))
