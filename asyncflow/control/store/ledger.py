"""The ledger of samples: every admitted sample ends exactly once, as trained, dropped or failed.

SQLite with one writer. A transaction is durable before its consequences happen: prompts are recorded before they are
sent, and a step's samples become trained in the same transaction that raises the version.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

State = Literal["created", "generated", "scored", "batched", "trained", "dropped", "failed"]
EndState = Literal["dropped", "failed"]
EndedSample = tuple[int, EndState, str]  # sample id, state, reason
LIVE: tuple[State, ...] = ("created", "generated", "scored", "batched")
TERMINAL: tuple[State, ...] = ("trained", "dropped", "failed")

_BEFORE: dict[State, tuple[State, ...]] = {  # state -> the states from which it is reached
    "generated": ("created",),
    "scored": ("created", "generated"),  # notices of two services may overtake each other
    "batched": ("scored",),
    "trained": ("batched",),
    "dropped": LIVE,
    "failed": LIVE,
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    sample_id INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    attempt INTEGER NOT NULL DEFAULT 0,
    admitted_version INTEGER NOT NULL,
    step INTEGER,
    term INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS samples_by_state ON samples (state, reason);
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY,
    term INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    committed_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class LedgerError(Exception):
    """A refused transition: a sample is not in a state from which the new one is reached."""


class Totals(msgspec.Struct, frozen=True):
    """The number of samples in each state; `created` counts all samples ever."""

    created: int
    trained: int
    dropped: int
    failed: int
    live: int

    @property
    def imbalance(self) -> int:
        """0 if every sample is accounted for."""
        return self.created - self.trained - self.dropped - self.failed - self.live


class Ledger:
    """One run's ledger. Not thread-safe: use it from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    @property
    def version(self) -> int:
        """The number of committed steps."""
        return self._meta("version")

    @property
    def term(self) -> int:
        """The newest term of a sample; -1 where there is none."""
        (term,) = self._db.execute("SELECT MAX(term) FROM samples").fetchone()
        return -1 if term is None else int(term)

    @property
    def cursor(self) -> int:
        """The number of prompts taken from the data, over all epochs."""
        return self._meta("cursor")

    def admit(self, samples: Iterable[int], version: int, term: int, cursor: int) -> None:
        """Record new samples and the data cursor after them. Raises LedgerError for a known id."""
        with self._transaction():
            try:
                self._db.executemany(
                    "INSERT INTO samples (sample_id, state, admitted_version, term) VALUES (?, 'created', ?, ?)",
                    [(s, version, term) for s in samples],
                )
            except sqlite3.IntegrityError as error:
                raise LedgerError(f"a sample is admitted twice: {error}") from error
            self._set_meta("cursor", cursor)

    def move(self, samples: Iterable[int], state: State, reason: str = "") -> None:
        """Move samples to a state. Raises LedgerError and changes nothing if one of them may not move there."""
        with self._transaction():
            self._move(samples, state, reason, None)

    def end(self, ended: Iterable[EndedSample]) -> None:
        """End samples as dropped or failed, each with its reason, in one transaction."""
        with self._transaction():
            for sample, state, reason in ended:
                self._move([sample], state, reason, None)

    def commit_step(self, step: int, term: int, samples: list[int]) -> None:
        """Mark samples trained and raise the version, in one transaction. `step` counts from 0."""
        with self._transaction():
            if self.version != step:
                raise LedgerError(f"step {step} can't be committed at version {self.version}")
            self._move(samples, "trained", "", step)
            self._db.execute("INSERT INTO steps VALUES (?, ?, ?, ?)", (step, term, len(samples), time.time()))
            self._set_meta("version", step + 1)

    def live(self) -> list[int]:
        """Ids of the samples that have not ended, ascending."""
        rows = self._db.execute(f"SELECT sample_id FROM samples WHERE {_state_in(LIVE)} ORDER BY sample_id")
        return [sample for (sample,) in rows]

    def restart_live(self, term: int) -> list[int]:
        """Put every live sample back to created with one more attempt, for a new term. Returns their ids."""
        live = self.live()
        self.regenerate(live, term)
        return live

    def regenerate(self, samples: Iterable[int], term: int) -> None:
        """Put live samples whose rows are lost back to created with one more attempt. LedgerError for any other."""
        again = (
            "UPDATE samples SET state = 'created', attempt = attempt + 1, term = ? "
            f"WHERE sample_id = ? AND {_state_in(LIVE)}"
        )
        with self._transaction():
            for sample in samples:
                if self._db.execute(again, (term, sample)).rowcount != 1:
                    raise LedgerError(f"sample {sample} can't be generated again: it has ended, or was never admitted")

    def totals(self) -> Totals:
        """The number of samples by state."""
        count = Counter[str](dict(self._db.execute("SELECT state, COUNT(*) FROM samples GROUP BY state")))
        ended = [count[state] for state in TERMINAL]
        return Totals(count.total(), *ended, live=sum(count[state] for state in LIVE))

    def reasons(self) -> dict[tuple[str, str], int]:
        """The number of samples by (state, reason)."""
        rows = self._db.execute("SELECT state, reason, COUNT(*) FROM samples GROUP BY state, reason")
        return {(s, r): int(n) for s, r, n in rows}

    def backup(self, path: Path) -> None:
        """Write a consistent copy with SQLite's backup: one file without a write-ahead log beside it."""
        copy = sqlite3.connect(path)
        try:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()

    def close(self) -> None:
        """Fold in the write-ahead log and close."""
        self._db.close()

    def _move(self, samples: Iterable[int], state: State, reason: str, step: int | None) -> None:
        update = (
            f"UPDATE samples SET state = ?, reason = ?, step = ? WHERE sample_id = ? AND {_state_in(_BEFORE[state])}"
        )
        for sample in samples:
            if self._db.execute(update, (state, reason, step, sample)).rowcount != 1:
                found = self._db.execute("SELECT state FROM samples WHERE sample_id = ?", (sample,)).fetchone()
                raise LedgerError(f"sample {sample} can't become {state}: it is {found[0] if found else 'unknown'}")

    def _meta(self, key: str) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0

    def _set_meta(self, key: str, value: int) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK if the block or the commit raised."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # a full disk may have ended it already
                self._db.execute("ROLLBACK")


def _state_in(states: tuple[State, ...]) -> str:
    """An SQL condition."""
    return f"state IN ({', '.join(map(repr, states))})"
