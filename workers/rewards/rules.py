"""Rule rewards: functions of prompt, response and reference texts. A rule is a function and a line in `RULES`.

The sandbox process imports this module, so it must stay free of heavy imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from workers.user_code import function_named

Rule = Callable[[str, str, str], float]


def exact_match(prompt: str, response: str, reference: str) -> float:
    """1.0 if the response equals the reference, ignoring white space at both ends, else 0.0."""
    return float(response.strip() == reference.strip())


def prefix_match(prompt: str, response: str, reference: str) -> float:
    """Length of the prefix that response and reference share, over the length of the longer text, 0 to 1."""
    given, wanted = response.strip(), reference.strip()
    shared = os.path.commonprefix([given, wanted])  # noqa: RUF071 - characters are meant
    return len(shared) / max(len(given), len(wanted), 1)


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
    """A registered rule or a user's. Raises LookupError as `function_named` does."""
    return function_named(name, RULES, "rule")
