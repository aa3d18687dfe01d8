"""A file of the user's own code as it travels: every service takes the same text, wherever it runs."""

from __future__ import annotations

import msgspec


class CodeSource(msgspec.Struct, frozen=True):
    """One module, whole."""

    module: str  # dotted name
    path: str  # where it was read, for tracebacks
    text: str
