"""Two small verifiable tasks and their data: sorting six letters, and adding two two-digit numbers.

The reward of sorting can be *learned* from preference pairs in about a minute. That of addition can't, so addition is
rewarded by a rule; its demonstrations are half wrong, so that the rule has something to teach. Every problem occurs
once in a data set, so no two of its files share a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import msgspec

from workers.data.datasets import Demonstration, Preference, Problem

LETTERS = "abcdefgh"
LENGTH = 6
CHARACTERS = LETTERS + "0123456789" + "+=:SA"  # what the tokenizer of asyncflow.demo.model knows
MAX_TOKENS = LENGTH + 2  # of a response: the answer, its end, and room to be too long


class DataSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The number of rows of each file."""

    sft: int = 60  # so few that the policy generalizes to about half of the problems
    comparisons: int = 30_000  # problems whose answers are compared, to train the reward model
    heldout_comparisons: int = 1_000
    train: int = 6_000
    heldout: int = 500


def sorting(rng: random.Random) -> Problem:
    """`S:dbcaah=` -> `aabcdh`."""
    letters = rng.choices(LETTERS, k=LENGTH)
    return Problem(f"S:{''.join(letters)}=", "".join(sorted(letters)))


def addition(rng: random.Random) -> Problem:
    """`A:37+85=` -> `122`. There are 8,100 such problems."""
    left, right = rng.randrange(10, 100), rng.randrange(10, 100)
    return Problem(f"A:{left}+{right}=", str(left + right))


def distinct(task: Callable[[random.Random], Problem], seed: int) -> Iterator[Problem]:
    """Distinct problems of a task. Raises ValueError when the task runs out of them."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        for _ in range(10_000):
            if (problem := task(rng)).prompt not in seen:
                break
        else:
            raise ValueError(f"{task.__name__}: no new problem in 10,000 tries after {len(seen)}; ask for fewer rows")
        seen.add(problem.prompt)
        yield problem


# --- rejected answers: mistakes of a half-trained policy, and mistakes that PPO may try


def _recount(answer: str, rng: random.Random) -> str:
    """One letter once too often and another once too seldom, sorted (`abb` for `aab`): the most common mistake."""
    letters = list(answer)
    letters[rng.randrange(len(letters))] = rng.choice(letters)
    return "".join(sorted(letters))


def _intrude(answer: str, rng: random.Random) -> str:
    """Any letter in place of another, sorted."""
    letters = list(answer)
    letters[rng.randrange(len(letters))] = rng.choice(LETTERS)
    return "".join(sorted(letters))


def _substitute(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer))
    return answer[:at] + rng.choice(LETTERS) + answer[at + 1 :]


def _swap(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer) - 1)
    return answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]


def _omit(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer))
    return answer[:at] + answer[at + 1 :]


def _stutter(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer))
    return answer[:at] + answer[at] + answer[at:]


def _insert(answer: str, rng: random.Random) -> str:
    at = rng.randrange(len(answer) + 1)
    return answer[:at] + rng.choice(LETTERS) + answer[at:]


MISTAKES: Mapping[Callable[[str, random.Random], str], int] = {  # with the odds of each
    _recount: 12,
    _intrude: 6,
    _substitute: 3,
    _swap: 2,
    _omit: 2,
    _stutter: 1,
    _insert: 1,
}


def spoil(answer: str, rng: random.Random, mistakes: int) -> str:
    """An answer with up to `mistakes` mistakes, never equal to `answer` and never shorter than two letters."""
    while True:
        spoiled = answer
        for mistake in rng.choices(list(MISTAKES), weights=list(MISTAKES.values()), k=mistakes):
            if len(spoiled) > 2 or mistake is not _omit:
                spoiled = mistake(spoiled, rng)
        if spoiled != answer:
            return spoiled


def preference(problem: Problem, rng: random.Random) -> Preference:
    """The right answer against a wrong one: mostly with one mistake, sometimes with many, sometimes truncated."""
    mistakes = rng.choices((1, 2, 3, 6), weights=(70, 15, 8, 7))[0]
    rejected = spoil(problem.reference, rng, mistakes)
    if rng.random() < 0.05:  # ran into max_tokens
        padded = rejected + "".join(rng.choices(LETTERS, k=MAX_TOKENS))
        return Preference(problem.prompt, problem.reference, padded[:MAX_TOKENS], rejected_truncated=True)
    return Preference(problem.prompt, problem.reference, rejected[: MAX_TOKENS - 1])


def write_sorting(folder: Path, seed: int, sizes: DataSizes = DataSizes()) -> None:  # noqa: B008 - it is frozen
    """Write a .jsonl file of that many rows for each field of `sizes`. No two files share a prompt."""
    problems = distinct(sorting, seed)
    for name in ("heldout", "heldout_comparisons", "sft", "comparisons", "train"):
        rows = islice(problems, getattr(sizes, name))
        write_rows(folder / f"{name}.jsonl", map(demonstration, rows) if name == "sft" else rows)


def write_addition(folder: Path, seed: int, *, sft: int = 4_000, train: int = 3_000, heldout: int = 500) -> None:
    """Write sft.jsonl, train.jsonl and heldout.jsonl. The reward is an exact match with the reference."""
    problems, rng = distinct(addition, seed), random.Random(seed)
    write_rows(folder / "heldout.jsonl", islice(problems, heldout))
    write_rows(folder / "sft.jsonl", (careless(problem, rng) for problem in islice(problems, sft)))
    write_rows(folder / "train.jsonl", islice(problems, train))


def careless(problem: Problem, rng: random.Random) -> Demonstration:
    """A demonstration of a sum that is too large by 1 half of the time."""
    return Demonstration(problem.prompt, str(int(problem.reference) + rng.randrange(2)))


def too_much(prompt: str, response: str, reference: str) -> float:
    """1 for a response that is a larger number than the reference, else 0: a cost."""
    return float(response.isdecimal() and int(response) > int(reference))


def demonstration(problem: Problem) -> Demonstration:
    """The problem with its right answer."""
    return Demonstration(problem.prompt, problem.reference)


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.Encoder().encode_lines(rows))


TASKS: dict[str, Callable[[Path, int], None]] = {"sorting": write_sorting, "arithmetic": write_addition}
