"""RowAttempts: which rows of one call to a rule's pool wait for an attempt, which are being scored, and the answers."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence

import msgspec

from workers.rewards.answers import RuleAnswer
from workers.rewards.arguments import RuleRow

LONGEST_WAIT_SECONDS = 30.0  # before another attempt


class WaitingRow(msgspec.Struct, order=True):
    """A row that waits for an attempt."""

    not_before: float  # time.monotonic()
    turn: int
    row: int
    attempts: int = 0  # that failed
    alone: bool = False


class RowAttempts:
    """The rows of one call of `score`: those that wait, those in a process, and the answers."""

    def __init__(self, rows: Sequence[RuleRow], retries: int, backoff: float, turns: itertools.count[int]) -> None:
        self.rows = rows
        self.in_flight: dict[int, WaitingRow] = {}
        self.unanswered = len(rows)
        self._answers: list[RuleAnswer | None] = [None] * len(rows)
        self._retries, self._backoff, self._turns = retries, backoff, turns
        self._waiting = [WaitingRow(0.0, next(turns), row) for row in range(len(rows))]

    @property
    def answers(self) -> list[RuleAnswer]:
        """One a row, once all are answered."""
        return [answer for answer in self._answers if answer is not None]

    @property
    def next_attempt(self) -> float:
        """When a row that waits for its next attempt may have it; infinite if none waits for the clock."""
        first = self._waiting[0].not_before if self._waiting else float("inf")
        return first if first > time.monotonic() else float("inf")

    @property
    def waiting_now(self) -> int:
        """The number of rows that could be scored now."""
        now = time.monotonic()
        return sum(waiting.not_before <= now for waiting in self._waiting)

    def take(self, *, batch: bool, busy: bool) -> list[WaitingRow] | None:
        """The rows of one call that may be made now: one, or all of a batch; a lonely one only where nobody is busy."""
        now, taken = time.monotonic(), list[WaitingRow]()
        while self._waiting and self._waiting[0].not_before <= now:
            first = self._waiting[0]
            if first.alone and (busy or taken):
                break
            taken.append(heapq.heappop(self._waiting))
            if first.alone or not batch:
                break
        return taken or None

    def answered(self, row: int, answer: RuleAnswer, now: float, jitter: float) -> None:
        """Keep an answer, or have the row tried again; `jitter` is the factor of a wait before that."""
        waiting = self.in_flight.pop(row)
        if answer.score is not None or answer.retry == "never" or waiting.attempts >= self._retries:
            self._answers[row] = answer
            self.unanswered -= 1
            return
        waiting.attempts += 1
        wait = 0.0
        if answer.retry == "later":
            wait = max(self._backoff * 2 ** (waiting.attempts - 1) * jitter, answer.wait_seconds)
        self._put(waiting, now + min(wait, LONGEST_WAIT_SECONDS))

    def score_again(self, row: int) -> None:
        """Have a row scored that its process did not come to."""
        self._put(self.in_flight.pop(row), 0.0)

    def score_alone(self, row: int) -> None:
        """Have a row scored again, alone: it or another row of its call, or of its process, is to blame."""
        waiting = self.in_flight.pop(row)
        waiting.alone = True
        self._put(waiting, 0.0)

    def give_up(self, cause: RuleAnswer) -> None:
        """No process starts: the rows that wait fail with the cause."""
        for waiting in self._waiting:
            self._answers[waiting.row] = cause
        self.unanswered -= len(self._waiting)
        self._waiting = []

    def _put(self, waiting: WaitingRow, not_before: float) -> None:
        waiting.not_before, waiting.turn = not_before, next(self._turns)
        heapq.heappush(self._waiting, waiting)
