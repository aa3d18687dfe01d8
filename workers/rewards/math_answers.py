"""Equality of mathematical answers in texts, by the library Math-Verify.

The library ends a long computation by SIGALRM, so it works only in a main thread, as a rule's process has one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from math_verify import parse, verify


def equal(response: str, reference: str) -> bool:
    """Whether the answer in the response equals the reference. Raises ValueError for a reference without an answer."""
    return bool(verify(_reference(reference), parse(response)))


@lru_cache(maxsize=1024)
def _reference(text: str) -> list[Any]:
    """The expressions in a reference: as it is, or as the LaTeX that it becomes between dollars."""
    if not (found := parse(text) or parse(f"${text}$")):
        raise ValueError(f"the reference {text!r:.100} holds no answer that Math-Verify reads")
    return found
