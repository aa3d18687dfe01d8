"""The consoles of the command line. Formatted text is printed without markup, because a path may contain brackets."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from rich.console import Console


class Form(StrEnum):
    """How a command prints what it found."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on standard output, unwrapped and without interpreting markup."""
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
