"""The rule of these recipes: a reward of one's own is a function in a file beside the recipe."""

from __future__ import annotations

import re


def right_sum(prompt: str, response: str, reference: str) -> float:
    """1 if the last number of the response is the reference, else 0."""
    return float(re.findall(r"\d+", response)[-1:] == [reference])
