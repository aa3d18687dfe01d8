"""The processes of one rule, and which rows each of them scores.

    an ordinary rule   a row a call, a call at a time in a process; up to `concurrency` processes
    an async rule      a row a call, up to `concurrency` calls at a time in one process
    a batch rule       all rows in one call

A process more is started only when the rows that wait would take longer than its start. A process that dies or misses a
deadline costs the row that it scored alone; where it had several rows, nobody knows whose fault it was, so each of them
is scored again alone. Where an attempt fails the row is tried again `retries` times: at once, or, where a connection
failed or a server was busy, after a wait that doubles.
"""

from __future__ import annotations

import itertools
import random
import selectors
import time
from collections.abc import Sequence

from protocols.control.code import CodeSource
from workers.rewards.answers import RuleAnswer, late_answer, refusal
from workers.rewards.arguments import RuleNeeds, RuleRow
from workers.rewards.exchange import Answers, RuleLimits
from workers.rewards.row_attempts import RowAttempts, WaitingRow
from workers.rewards.sandbox import CallInFlight, Sandbox, SandboxDied

QUICK_SECONDS = 0.002  # a row; a process of such a rule has its next rows at hand
QUICK_CALLS = 32
SLOW_SECONDS = 0.02  # one row alone tells nothing before that
BLOCKED_SECONDS = 1.0  # an async rule ends its own late calls; with this delay its loop itself is stuck


class RuleFailed(Exception):
    """A rule can't be used: its module does not load, or its process does not start."""


class SandboxPool:
    """Scores rows by one rule, several at a time."""

    def __init__(
        self,
        rule: str,
        source: CodeSource | None = None,
        *,
        unusable: str = "",
        timeout_seconds: float,
        concurrency: int = 1,
        retries: int = 0,
        backoff_seconds: float = 0.5,
        memory_bytes: int = 0,
        output_bytes: int = 0,
    ) -> None:
        """Args:

        source: the text of the rule's module; None for a registered rule.
        unusable: why the rule has no source that could be run; "": it has.
        timeout_seconds: of one call.
        concurrency: most processes, or most rows at a time in the process of an async rule.
        retries: further attempts of a row that failed.
        backoff_seconds: the wait before the first of them where the failure was of a connection or a busy server.
        memory_bytes, output_bytes: see RuleLimits.
        """
        self._rule, self._source = rule, source
        self._timeout, self._retries, self._backoff = timeout_seconds, retries, backoff_seconds
        self._limits = RuleLimits(timeout_seconds, memory_bytes, output_bytes)
        self._concurrency = concurrency
        self._selector = selectors.DefaultSelector()
        self._sandboxes: list[Sandbox] = []
        self._needs: RuleNeeds | None = None
        self._unusable = unusable  # why the rule can't be loaded
        self._start_seconds = 0.0
        self._row_seconds = 0.0  # mean of the answered calls, the newest weigh most
        self._turns = itertools.count()

    @property
    def pids(self) -> list[int]:
        """The processes that exist."""
        return [sandbox.pid for sandbox in self._sandboxes]

    def start(self) -> RuleNeeds:
        """Start the first process, if there is none, and return what the rule asks for.

        Raises RuleFailed if its module does not load or the process dies or takes too long: then none is left.
        """
        if self._needs is None and not self._unusable:
            self._drop_dead()
            if not self._sandboxes:
                self._add()
            sandbox = self._sandboxes[0]
            try:
                while sandbox.ready is None:
                    self._wait(sandbox.deadline)
                    if time.monotonic() >= sandbox.deadline:
                        raise SandboxDied(sandbox.late)
                    sandbox.exchange()
            except SandboxDied as error:
                self._remove(sandbox)
                raise RuleFailed(f"rule {self._rule} {error}") from None
            self._on_ready(sandbox)
        if self._needs is None:
            named = self._unusable.startswith("rule ")
            raise RuleFailed(self._unusable if named else f"rule {self._rule}: {self._unusable}")
        return self._needs

    def score(self, rows: Sequence[RuleRow]) -> list[RuleAnswer]:
        """An answer a row, in their order; one without a score says why in `error`. Raises what `start` raises."""
        needs = self.start()
        self._drop_dead()
        firing = RowAttempts(rows, self._retries, self._backoff, self._turns)
        while firing.unanswered:
            self._assign(firing, needs)
            self._wait(min(self._next_deadline(), firing.next_attempt, self._next_growth(firing, needs)))
            for sandbox in list(self._sandboxes):
                self._serve(sandbox, firing)
        return firing.answers

    def close(self) -> None:
        """Kill the processes, with all that they started. The next call starts new ones."""
        for sandbox in list(self._sandboxes):
            self._remove(sandbox)

    # --- processes

    def _add(self) -> None:
        self._sandboxes.append(Sandbox(self._rule, self._source, self._limits, self._selector))

    def _remove(self, sandbox: Sandbox) -> None:
        self._sandboxes.remove(sandbox)
        sandbox.close()

    def _drop_dead(self) -> None:
        """Forget processes that died with nothing to do."""
        for sandbox in [sandbox for sandbox in self._sandboxes if not sandbox.alive]:
            self._remove(sandbox)

    def _on_ready(self, sandbox: Sandbox) -> None:
        assert sandbox.ready is not None
        self._start_seconds = time.monotonic() - sandbox.started
        self._needs, self._unusable = (None if sandbox.ready.error else sandbox.ready.needs), sandbox.ready.error
        if self._unusable:
            self.close()

    def _wait(self, until: float) -> None:
        self._selector.select(None if until == float("inf") else max(0.0, until - time.monotonic()))

    def _next_deadline(self) -> float:
        return min((sandbox.deadline for sandbox in self._sandboxes), default=float("inf"))

    # --- which process scores which row

    def _assign(self, firing: RowAttempts, needs: RuleNeeds) -> None:
        """Give rows to processes that have room, and start a process where that is worth it."""
        if not self._sandboxes or time.monotonic() >= self._next_growth(firing, needs):
            self._add()
        for sandbox in list(self._sandboxes):
            while (taken := self._next_call(sandbox, firing, needs)) is not None:
                late = self._timeout + (BLOCKED_SECONDS if needs.concurrent else 0.0)
                if sandbox.calls and not needs.concurrent:
                    late = float("inf")  # its time starts when the calls before it are answered
                rows, numbers = [firing.rows[w.row] for w in taken], [w.row for w in taken]
                firing.in_flight |= {w.row: w for w in taken}
                sandbox.call(rows, numbers, time.monotonic() + late, alone=taken[0].alone)

    def _next_call(self, sandbox: Sandbox, firing: RowAttempts, needs: RuleNeeds) -> list[WaitingRow] | None:
        """The rows of the next call that a process has room for; None if it has none, or no row may be tried now."""
        if sandbox.ready is None or any(call.alone for call in sandbox.calls.values()):
            return None
        if len(sandbox.calls) >= self._room(needs):
            return None
        return firing.take(batch=needs.batch, busy=bool(sandbox.calls))

    def _room(self, needs: RuleNeeds) -> int:
        """How many calls a process may have. Those of an ordinary rule are made one after the other."""
        if needs.concurrent:
            return self._concurrency
        quick = 0.0 < self._row_seconds < QUICK_SECONDS and not needs.batch
        return QUICK_CALLS if quick else 1

    def _next_growth(self, firing: RowAttempts, needs: RuleNeeds) -> float:
        """When it is worth to start another process, because the rows that wait would take longer than its start."""
        if needs.concurrent or needs.batch or len(self._sandboxes) >= self._concurrency:
            return float("inf")
        heads = [next(iter(sandbox.calls.values())) for sandbox in self._sandboxes if sandbox.calls]
        waiting = firing.waiting_now
        if not waiting or len(heads) < len(self._sandboxes):  # or a process is idle or starting
            return float("inf")
        worth = self._start_seconds * len(self._sandboxes) / waiting  # seconds a row from which it is
        return 0.0 if self._row_seconds > worth else min(call.start for call in heads) + max(worth, SLOW_SECONDS)

    # --- what a process answered

    def _serve(self, sandbox: Sandbox, firing: RowAttempts) -> None:
        starting = sandbox.ready is None
        died: SandboxDied | None = None
        try:
            answered = sandbox.exchange()
        except SandboxDied as error:
            answered, died = error.answered, error
        for call, answers in answered:
            self._answered(sandbox, call, answers, firing)
        if died is not None:
            self._died(sandbox, firing, refusal(str(died)))
            return
        if starting and sandbox.ready is not None:
            self._on_ready(sandbox)
        elif time.monotonic() >= sandbox.deadline:
            self._died(sandbox, firing, refusal(sandbox.late) if starting else late_answer(self._timeout))

    def _answered(self, sandbox: Sandbox, call: CallInFlight, answers: Answers, firing: RowAttempts) -> None:
        seconds = (time.monotonic() - call.start) / len(call.rows)
        assert self._needs is not None
        if not self._needs.concurrent and sandbox.calls:
            head = next(iter(sandbox.calls.values()))  # which starts now
            head.start = time.monotonic()
            head.deadline = head.start + self._timeout
        if answers.number > 1:  # the first call of a process warms it up
            self._row_seconds = seconds if not self._row_seconds else 0.7 * self._row_seconds + 0.3 * seconds
        now, jitter = time.monotonic(), random.uniform(0.5, 1.0)  # the same for all rows: a batch stays together
        for row, answer in zip(call.rows, answers.answers, strict=True):
            if answers.raised and len(call.rows) > 1 and answer.retry != "later":
                firing.score_alone(row)
            else:
                firing.answered(row, answer, now, jitter)

    def _died(self, sandbox: Sandbox, firing: RowAttempts, cause: RuleAnswer) -> None:
        """A process is gone, or has to go: the row is to blame on which it worked, or one of several such rows."""
        calls = list(sandbox.calls.values())
        at_work = len(calls) if self._needs is not None and self._needs.concurrent else 1
        suspects = [row for call in calls[:at_work] for row in call.rows]
        self._remove(sandbox)
        if sandbox.ready is None:  # the next one would not start either
            self._concurrency = max(1, len(self._sandboxes))
            if not self._sandboxes:
                firing.give_up(cause)
        for row in (row for call in calls[at_work:] for row in call.rows):
            firing.score_again(row)
        for row in suspects:
            if len(suspects) == 1:
                firing.answered(row, cause, time.monotonic(), 1.0)
            else:
                firing.score_alone(row)
