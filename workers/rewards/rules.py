"""Rule rewards: functions of prompt, response and reference texts. A rule is a function and a line in `RULES`.

The sandbox process imports this module, so it must stay free of heavy imports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

Rule = Callable[[str, str, str], float]


def exact_match(prompt: str, response: str, reference: str) -> float:
    """1.0 if the response equals the reference, ignoring white space at both ends, else 0.0."""
    return float(response.strip() == reference.strip())


def prefix_match(prompt: str, response: str, reference: str) -> float:
    """Length of the prefix that response and reference share, over the length of the longer text, 0 to 1."""
    given, wanted = response.strip(), reference.strip()
    right = next((i for i, (a, b) in enumerate(zip(given, wanted)) if a != b), min(len(given), len(wanted)))  # noqa: B905
    return right / max(len(given), len(wanted), 1)


def excess_characters(prompt: str, response: str, reference: str) -> float:
    """A cost: the number of characters by which the response exceeds the reference, without white space at both ends.

    It is never negative, because a negative cost of short responses would reward silence.
    """
    return float(max(0, len(response.strip()) - len(reference.strip())))


RULES: dict[str, Rule] = {
    "exact_match": exact_match,
    "prefix_match": prefix_match,
    "excess_characters": excess_characters,
}


def rule_named(name: str) -> Rule:
    """A registered rule, or the function that "package.module:function" names.

    Raises LookupError for an unknown name, a module that fails to import (for whatever reason) and a missing function.
    """
    if name in RULES:
        return RULES[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise LookupError(f"rule {name!r} is none of {', '.join(RULES)} and no package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise LookupError(f"rule {name!r}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise LookupError(f"rule {name!r}: module {module} has no function {attribute!r}")
    return cast(Rule, function)
