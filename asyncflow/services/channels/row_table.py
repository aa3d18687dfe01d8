"""RowTable joins the rows of several edges by sample id, and takes each row of each edge exactly once.

Deliveries may arrive in any order, twice, or late from an abandoned attempt; a row's key is (sample id, attempt, edge).
A row is *complete* when every edge brought a value or a tombstone, and dead if any of them is a tombstone. The table
remembers a row that left until its prompt is finished, so the prompts in flight bound its memory. It never waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

import msgspec

from asyncflow.services.channels.finished_prompts import FinishedPrompts
from protocols.data.ids import prompt_of
from protocols.stage import Failure

V = TypeVar("V")


class Joined(msgspec.Struct, Generic[V]):
    """Rows that leave together: `inputs[position][i]` belongs to `samples[i]`; each dead row is one tombstone."""

    samples: list[int]
    inputs: tuple[list[V], ...]
    failures: list[Failure]
    attempt: int = 0


class Arrival(msgspec.Struct, frozen=True):
    """The effect of one delivery."""

    complete: list[int]
    refused: list[int]  # rows that arrived before, or belong to an abandoned attempt or a finished prompt


class _Row(Generic[V]):
    __slots__ = ("attempt", "slots")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.slots: dict[int, V | Failure] = {}


class RowTable(Generic[V]):
    """The rows of one stage's `edges` inputs."""

    def __init__(self, edges: int, finished: FinishedPrompts | None = None) -> None:
        """`finished`: the finished prompts, if several tables share them."""
        self._edges = edges
        self._held: dict[int, _Row[V]] = {}
        self._complete: dict[int, None] = {}  # in the order in which they became complete
        self._left: dict[int, int] = {}  # sample -> the attempt that left
        self._of_prompt: defaultdict[int, set[int]] = defaultdict(set)  # prompt -> its samples, held or left
        self._finished = finished if finished is not None else FinishedPrompts()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def complete(self) -> int:
        """The number of rows that can leave."""
        return len(self._complete)

    def fresh(self, position: int, samples: Iterable[int], attempt: int = 0) -> list[int]:
        """The samples that `arrive` would take."""
        return [s for s in samples if self._wants(position, s, attempt)]

    def arrive(self, position: int, rows: Iterable[tuple[int, V | Failure]], attempt: int = 0) -> Arrival:
        """Take (sample, value or tombstone) rows of one edge; a newer attempt replaces the rows of an older one."""
        complete, refused = [], []
        for sample, value in rows:
            if not self._wants(position, sample, attempt):
                refused.append(sample)
                continue
            row = self._held.get(sample)
            if row is None or row.attempt < attempt:
                row = self._held[sample] = _Row(attempt)
                self._complete.pop(sample, None)
                self._of_prompt[prompt_of(sample)].add(sample)
            row.slots[position] = value
            if len(row.slots) == self._edges:
                self._complete[sample] = None
                complete.append(sample)
        return Arrival(complete, refused)

    def next_complete(self, most: int, in_id_order: bool = False) -> list[int]:
        """Up to `most` complete rows of one attempt, without removing them; oldest first, or in id order."""
        ids = list(islice(self._complete, most))
        ids = [s for s in ids if self._held[s].attempt == self._held[ids[0]].attempt]
        return sorted(ids) if in_id_order else ids

    def is_complete(self, sample: int) -> bool:
        """Whether a row can leave."""
        return sample in self._complete

    def failure_of(self, sample: int) -> Failure | None:
        """The tombstone of a held row that is dead, else None."""
        return next((v for v in self._held[sample].slots.values() if isinstance(v, Failure)), None)

    def column(self, position: int, samples: Sequence[int]) -> list[V]:
        """The values one edge brought for live rows, in their order, without removing them."""
        values = [self._held[s].slots[position] for s in samples]
        return [v for v in values if not isinstance(v, Failure)]

    def take(self, samples: Sequence[int]) -> Joined[V]:
        """Remove complete rows, in the given order. Raises KeyError for a row that is not complete."""
        if missing := [s for s in samples if s not in self._complete]:
            raise KeyError(f"sample {missing[0]} is incomplete")
        dead = {s: f for s in samples if (f := self.failure_of(s)) is not None}
        alive = [s for s in samples if s not in dead]
        inputs = tuple(self.column(p, alive) for p in range(self._edges))
        attempt = max((self._held[s].attempt for s in samples), default=0)
        for sample in samples:
            self._left[sample] = self._held.pop(sample).attempt
            del self._complete[sample]
        return Joined(alive, inputs, list(dead.values()), attempt)

    def take_back(self, samples: Iterable[int]) -> None:
        """Accept these rows again, because they left but could not be read."""
        for sample in samples:
            self._left.pop(sample, None)

    def end(self, prompts: Iterable[int]) -> None:
        """These prompts are finished: drop their rows, and refuse those that still arrive."""
        for prompt in prompts:
            for sample in self._of_prompt.pop(prompt, ()):
                self._held.pop(sample, None)
                self._complete.pop(sample, None)
                self._left.pop(sample, None)
            self._finished.add(prompt)

    def _wants(self, position: int, sample: int, attempt: int) -> bool:
        if self._left.get(sample, -1) >= attempt or prompt_of(sample) in self._finished:
            return False
        row = self._held.get(sample)
        return row is None or row.attempt < attempt or (row.attempt == attempt and position not in row.slots)
