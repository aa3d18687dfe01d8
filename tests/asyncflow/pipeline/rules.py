"""Reward rules of the tests. The sandbox process imports this module, so it has no heavy imports."""

from __future__ import annotations


def flat_where_even(prompt: str, response: str, reference: str) -> float:
    """1 for all answers to a prompt that begins with an even digit; for other prompts `varied`."""
    return 1.0 if int(prompt[0]) % 2 == 0 else varied(prompt, response, reference)


def flat(prompt: str, response: str, reference: str) -> float:
    """The same score for every answer."""
    return 0.5


def varied(prompt: str, response: str, reference: str) -> float:
    """A score from -1 to 1 that depends on the characters of the answer and their positions."""
    total = sum((place + 1) * ord(character) for place, character in enumerate(response))
    return (total % 199) / 99.0 - 1.0


def digits(prompt: str, response: str, reference: str) -> float:
    """The share of digits among the answer's characters."""
    return sum(map(str.isdigit, response)) / max(len(response), 1)


def refuses_some(prompt: str, response: str, reference: str) -> float:
    """`varied`, but no score for about a quarter of the answers."""
    if sum(map(ord, response)) % 4 == 0:
        raise ValueError("no score for this answer")
    return varied(prompt, response, reference)
