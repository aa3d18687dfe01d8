"""The rules of these recipes: a reward of one's own is a function in a file beside the recipe."""

from __future__ import annotations

import re


def right_sum(response: str, reference: str) -> float:
    """1 if the last number of the response is the reference, else 0."""
    return float(re.findall(r"\d+", response)[-1:] == [reference])


def near_sum(response: str, reference: str) -> dict[str, float]:
    """1 / (1 + distance) of the last number from the reference, 0 without a number: a near miss beats a far one.

    At its start the model is seldom right: by `right_sum` most groups of samples would have equal rewards.
    """
    numbers = re.findall(r"\d{1,6}", response)
    near = 1 / (1 + abs(int(numbers[-1]) - int(reference))) if numbers else 0.0
    return {"score": near, "right": right_sum(response, reference)}
