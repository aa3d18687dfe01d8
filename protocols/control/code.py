"""CodeSource: the text of one of the user's modules. The process of a rule imports it, so it has no heavy imports."""

from __future__ import annotations

import msgspec


class CodeSource(msgspec.Struct, frozen=True):
    """One module of the user's own code, whole, so that every service runs the same text wherever it is."""

    module: str  # dotted name, or the file as the recipe names it
    path: str  # where it was read, for tracebacks
    text: str
