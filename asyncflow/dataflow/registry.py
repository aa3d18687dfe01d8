"""Finds algorithms by name, or a user's own by "package.module:function"."""

from __future__ import annotations

import difflib

from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.dataflow.graph import DataflowError
from asyncflow.dataflow.trace import Algorithm
from workers.user_code import BadCode, imported, is_file


def algorithm_named(name: str) -> Algorithm:
    """The algorithm that a recipe names. Raises DataflowError for an unknown name and a module that fails to import."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, colon, attribute = name.partition(":")
    if not colon or not (is_file(module) or all(part.isidentifier() for part in module.split("."))):
        close = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise DataflowError(
            f"algorithm {name!r}{hint}; known: {', '.join(ALGORITHMS)}, or package.module:function or file.py:function"
        )
    try:
        function = getattr(imported(module), attribute, None)
    except BadCode as error:
        raise DataflowError(f"algorithm {name!r}: {error}") from error
    if not hasattr(function, "__asyncflow_algorithm__"):
        raise DataflowError(f"algorithm {name!r}: {module} has no function {attribute!r} marked with @algorithm")
    return function  # type: ignore[return-value]
