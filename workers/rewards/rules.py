"""The ready rules. A rule is a function and a line in `RULES`; what it may take and return: `arguments` and `answers`.

The process of a rule imports this module, so it must stay free of heavy imports.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from workers.user_code import function_named

Rule = Callable[..., Any]


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


def math_verify(response: str, reference: str) -> float:
    """1.0 if the response's answer equals the reference as mathematics, by the library Math-Verify; else 0.0.

    The answer is the last expression in the response, one in \\boxed{} first. A reference is LaTeX or a plain number.
    Raises ValueError for one that holds no expression. A comparison that takes longer than 5 s shows no equality.
    """
    from workers.rewards.math_answers import equal

    return float(equal(response, reference))


RULES: dict[str, Rule] = {
    "exact_match": exact_match,
    "prefix_match": prefix_match,
    "excess_characters": excess_characters,
    "math_verify": math_verify,
}
TRUSTED = {"exact_match", "prefix_match", "excess_characters"}  # they score any texts, so they need no trial


def rule_named(name: str) -> Rule:
    """A registered rule or a user's. Raises LookupError as `function_named` does, and for a library that is missing."""
    if name == "math_verify":
        try:  # its import takes longer than a row may
            importlib.import_module("workers.rewards.math_answers")
        except ImportError as error:
            raise LookupError(f"it needs Math-Verify: pip install 'asyncflow[math]' ({error})") from error
    return function_named(name, RULES, "rule")
