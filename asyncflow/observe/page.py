"""A report's page: frame, sections and charts. It needs no network (its security policy forbids it) and no script."""

from __future__ import annotations

from collections.abc import Sequence

from asyncflow.observe.charts import ChartLine, line_chart
from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.style import STYLE


def page(title: str, main: Sequence[str]) -> Markup:
    """A page with this title and content."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    html = tag("html", tag("head", *head), tag("body", tag("main", *main)), lang="en")
    return Markup(f"<!doctype html>\n{html}\n")


def section(title: str, *content: str) -> Markup:
    """A titled section."""
    return tag("section", tag("h2", title), *content)


def figure(title: str, note: str, lines: list[ChartLine], zero: bool = False) -> Markup:
    """A titled chart; empty if no line has a point."""
    filled = [line for line in lines if line.points]
    if not filled:
        return Markup("")
    keys = [tag("span", tag("i", class_=f"key {line.style}"), line.name) for line in filled if line.style == "second"]
    caption = tag("figcaption", tag("b", title), tag("small", note, *keys))
    return tag("figure", caption, line_chart(filled, zero=zero))
