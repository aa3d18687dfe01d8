"""The consoles of the command line. Formatted text is printed without markup, because a path may contain brackets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from rich.console import Console


class Form(StrEnum):
    """How a command prints what it found."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


class NotPrinted(OSError):
    """What is printed can't be written, as to a file on a full disk."""


class ClosableConsole(Console):
    """A console whose reader may go away, as `head` does, or whose file can't grow: what is printed then is dropped."""

    closed = False  # nobody reads it any more

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does. Raises NotPrinted, once, where that can't be written."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self._drop()
            raise NotPrinted(error.errno, f"the output can't be written: {error.strerror}") from error

    def on_broken_pipe(self) -> None:
        """Called by rich when the pipe is broken. rich itself would end the program here."""
        self.closed = True
        self._drop()

    def _drop(self) -> None:
        self.quiet = True
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.file.fileno())  # else the interpreter fails at its end, when it flushes its streams
        os.close(nothing)


out, err = ClosableConsole(highlight=False), ClosableConsole(stderr=True, highlight=False)


def open_standard_streams() -> None:
    """Open /dev/null in the place of standard streams that were closed.

    Otherwise the next file that is opened, such as the ledger, gets their descriptor, and what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on standard output, unwrapped and without interpreting markup."""
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
