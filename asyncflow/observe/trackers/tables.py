"""Samples as the rows of a table, for trackers that show tables."""

from __future__ import annotations

from collections.abc import Sequence

from protocols.control.samples import ShownSample

Cell = str | float | int | bool | None

COLUMNS = ["step", "sample", "prompt", "response", "reference", "reward", "parts", "cost", "advantage"]
COLUMNS += ["oldest version", "newest version", "tokens", "cut"]


def rows_of(step: int, samples: Sequence[ShownSample]) -> list[list[Cell]]:
    """One row for each sample, in the order of COLUMNS."""
    return [
        [
            *(step, str(s.sample), s.prompt, s.response, s.reference, s.reward),  # an id has more digits than a float
            ", ".join(f"{name} {value:.4g}" for name, value in s.parts.items()),
            *(s.cost, s.advantage, *s.versions, s.tokens, s.cut),
        ]
        for s in samples
    ]


def markdown_of(step: int, samples: Sequence[ShownSample]) -> str:
    """The table as markdown. Texts are code, so that nothing in them is markup."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows_of(step, samples)]
    return "\n".join(lines)


def _cell(value: Cell) -> str:
    if not isinstance(value, str):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    if not value:
        return ""
    text = value.replace("|", "¦").replace("`", "'").replace("\r", "␍").replace("\n", "⏎")  # one line, no end of a cell
    return f"`{text}`"
