"""Builds HTML and SVG from values; every text is escaped unless it was built here."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is already markup and is not escaped again."""

    __slots__ = ()


Attribute = str | float | None


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """An element. `class_` becomes class, `stroke_width` stroke-width; attributes that are None are omitted."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: tuple[str, ...] | list[str]) -> Markup:
    """Concatenate children, escaping plain texts."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


_VOID = {"meta", "br", "hr"}


def _text(value: str | float) -> str:
    """An attribute's text; numbers with the five digits that an image of this size needs."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
