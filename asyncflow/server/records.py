"""What a server remembers over its restarts, in SQLite: the runs that it was asked for, and its answers by key.

A key and what it stands for are in the database before anything is done, so that a repeat, after whatever was killed,
does nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from protocols.control.problems import Conflict

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    recipe BLOB NOT NULL,       -- TOML, with the overrides applied
    devices INTEGER NOT NULL,
    wanted TEXT NOT NULL,       -- 'start' until its process was started, then 'started'
    arguments TEXT NOT NULL DEFAULT '[]',  -- of the process, beside the recipe and the folder
    process INTEGER NOT NULL DEFAULT 0,
    process_start TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    request TEXT NOT NULL,      -- digest of what was asked
    created REAL NOT NULL,
    term INTEGER NOT NULL DEFAULT -1,  -- of the run, when it was asked
    answer BLOB                 -- NULL: not done yet
);
"""
KEPT_SECONDS = 7 * 24 * 3600.0  # an answer, by its key


class RunRecord(msgspec.Struct, frozen=True):
    """A run that the server was asked for."""

    name: str
    created: float
    recipe: bytes
    devices: int
    wanted: str
    arguments: list[str]
    process: int
    process_start: str  # which tells the process from a later one of its number


class Records:
    """The database. Its calls run in a thread, one at a time."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None keeps it in memory."""
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)
        self._db.execute("DELETE FROM answers WHERE created < ?", (time.time() - KEPT_SECONDS,))
        self._one = asyncio.Lock()

    async def ask(self, key: str, request: str, term: int = -1) -> tuple[bytes | None, int]:
        """Note a request by its key: its answer if there is one, and the term in which it was asked first.

        Raises Conflict where the key is another request's.
        """

        def noted() -> tuple[bytes | None, int]:
            row = self._db.execute("SELECT request, answer, term FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                values = (key, request, time.time(), term)
                self._db.execute("INSERT INTO answers (key, request, created, term) VALUES (?, ?, ?, ?)", values)
                return None, term
            if row[0] != request:
                raise Conflict(f"Idempotency-Key {key!r} was sent with another request: make a new key for each")
            return row[1], row[2]

        return await self._do(noted)

    async def answer(self, key: str, answer: bytes) -> None:
        """Keep the answer of a request."""
        await self._do(lambda: self._db.execute("UPDATE answers SET answer = ? WHERE key = ?", (answer, key)))

    async def run_of(self, key: str, request: str) -> str:
        """The name of the run that a key has started; "" for a new key. Raises Conflict for another request's key."""

        def looked() -> str:
            row = self._db.execute("SELECT request, answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return ""
            if row[0] != request:
                raise Conflict(f"Idempotency-Key {key!r} was sent with another request: make a new key for each")
            return row[1].decode()

        return await self._do(looked)

    async def add(self, run: RunRecord, key: str, request: str) -> str:
        """Note a new run together with its key; the name of the run that the key stands for, "" where its own is taken.

        Raises Conflict for another request's key.
        """

        def added() -> str:
            try:
                with self._transaction():
                    self._db.execute(
                        "INSERT INTO runs (name, created, recipe, devices, wanted, arguments) "
                        "VALUES (?, ?, ?, ?, ?, ?)",
                        (
                            run.name,
                            run.created,
                            run.recipe,
                            run.devices,
                            run.wanted,
                            msgspec.json.encode(run.arguments),
                        ),
                    )
                    values = (key, request, time.time(), run.name.encode())
                    self._db.execute("INSERT INTO answers (key, request, created, answer) VALUES (?, ?, ?, ?)", values)
            except sqlite3.IntegrityError:  # of the name, or of a key that came twice at once
                return ""
            return run.name

        return await self._do(added) or await self.run_of(key, request)

    async def restart(self, name: str, devices: int, arguments: list[str], key: str, request: str) -> bool:
        """Note that a run, which may have been started by hand, is to start again; False where the key was known."""

        def noted() -> bool:
            row = self._db.execute("SELECT request FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                if row[0] != request:
                    raise Conflict(f"Idempotency-Key {key!r} was sent with another request: make a new key for each")
                return False
            now, text = time.time(), msgspec.json.encode(arguments)
            with self._transaction():
                self._db.execute(
                    "INSERT INTO runs (name, created, recipe, devices, wanted, arguments) "
                    "VALUES (?, ?, '', ?, 'start', ?) "
                    "ON CONFLICT (name) DO UPDATE SET wanted = 'start', process = 0, arguments = excluded.arguments, "
                    "recipe = '', created = excluded.created",
                    (name, now, devices, text),
                )
                values = (key, request, now, name.encode())
                self._db.execute("INSERT INTO answers (key, request, created, answer) VALUES (?, ?, ?, ?)", values)
            return True

        return await self._do(noted)

    async def started(self, name: str, process: int, process_start: str) -> None:
        """Note the process of a run."""
        statement = "UPDATE runs SET wanted = 'started', process = ?, process_start = ? WHERE name = ?"
        await self._do(lambda: self._db.execute(statement, (process, process_start, name)))

    async def forget_start(self, name: str) -> None:
        """Note that a run which waits for devices is not to start."""
        await self._do(lambda: self._db.execute("UPDATE runs SET wanted = 'started' WHERE name = ?", (name,)))

    async def runs(self) -> list[RunRecord]:
        """All runs, in the order in which they were asked for."""
        query = (
            "SELECT name, created, recipe, devices, wanted, arguments, process, process_start FROM runs "
            "ORDER BY created"
        )
        rows = await self._do(lambda: self._db.execute(query).fetchall())
        return [
            RunRecord(n, at, r if isinstance(r, bytes) else r.encode(), d, w, msgspec.json.decode(a), p, s)
            for n, at, r, d, w, a, p, s in rows
        ]

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it, or nothing where anything fails, as on a full disk."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # the first error tells more
                if self._db.in_transaction:  # SQLite itself ends it at some errors
                    self._db.execute("ROLLBACK")
            raise

    async def _do(self, work: Callable[[], T]) -> T:
        async with self._one:
            return await asyncio.to_thread(work)


def digest_of(*parts: str | bytes) -> str:
    """What tells one request from another under the same key."""
    return hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()
