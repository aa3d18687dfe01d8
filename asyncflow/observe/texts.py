"""Generated texts in the report: tables of samples from the beginning of a run to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncflow.observe.charts import number
from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.page import section

TABLES = 5  # in the report; samples.jsonl has all


def texts_section(tables: Sequence[Mapping[str, Any]]) -> Markup:
    """The section with the first table, the last, and some between them. `tables`: the lines of samples.jsonl."""
    if not tables:
        return section("Generated texts", tag("p", "The run left no samples.jsonl.", class_="muted"))
    note = "Of each step some samples, from the lowest reward to the highest. `asyncflow samples` shows all tables."
    shown = [_table(line, is_last=line is tables[-1]) for line in spread(tables, TABLES)]
    return section("Generated texts", tag("p", note, class_="muted"), *shown)


def spread(tables: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` of them, two or more, at equal distances, the first and the last among them."""
    if len(tables) <= most:
        return list(tables)
    return [tables[round(i * (len(tables) - 1) / (most - 1))] for i in range(most)]


def facts_of(row: Mapping[str, Any]) -> str:
    """What is known of a sample beside its texts, in one line."""
    versions = row["versions"]
    facts = [f"reward {_number(row['reward'])}"]
    facts += [f"{name} {_number(value)}" for name, value in row["parts"].items()]
    facts += [f"cost {_number(row['cost'])}"] if row["cost"] is not None else []
    facts += [f"advantage {_number(row['advantage'])}", f"{row['tokens']:,} tokens{', cut' if row['cut'] else ''}"]
    facts += [f"version {versions[0]}" if versions[0] == versions[1] else f"versions {versions[0]} to {versions[1]}"]
    return "  ".join(facts)


def _table(line: Mapping[str, Any], *, is_last: bool) -> Markup:
    rows = [
        tag(
            "tr",
            tag("td", facts_of(row).replace("  ", "\n"), class_="facts"),
            tag("td", row["prompt"], tag("span", row["response"], class_="response")),
            tag("td", row["reference"]),
        )
        for row in line["rows"]
    ]
    head = tag("tr", *(tag("th", title) for title in ("", "prompt and response", "reference")))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="texts")
    summary = tag("summary", f"Step {line['step']:,}")
    return tag("details", summary, tag("div", table, class_="wide"), open="" if is_last else None)


def _number(value: float | None) -> str:
    return "not finite" if value is None else number(round(value, 4))
