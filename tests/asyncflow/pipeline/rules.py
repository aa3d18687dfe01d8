"""Rules of the tests' own tasks. The process that runs rules imports this module, so it stays small."""

from __future__ import annotations


def flat_where_even(prompt: str, response: str, reference: str) -> float:
    """1 for every answer to a prompt that begins with an even digit; else a number that tells answers apart."""
    return 1.0 if int(prompt[0]) % 2 == 0 else telling(prompt, response, reference)


def flat(prompt: str, response: str, reference: str) -> float:
    """The same for every answer."""
    return 0.5


def telling(prompt: str, response: str, reference: str) -> float:
    """-1 to 1, from the characters of the answer and their places."""
    total = sum((place + 1) * ord(character) for place, character in enumerate(response))
    return (total % 199) / 99.0 - 1.0


def digits(prompt: str, response: str, reference: str) -> float:
    """Which share of the answer is digits."""
    return sum(map(str.isdigit, response)) / max(len(response), 1)
