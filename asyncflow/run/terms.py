"""The term of a run rises with every start and rollback, so that nothing of an earlier one is taken for its own.

It stands in a file of the run folder. Where that file is damaged or gone, the ledgers and the checkpoints still know
the terms that were.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from asyncflow.control.store import checkpoint
from asyncflow.control.store.ledger import Ledger

TERM = "term"
LINEAGE = "lineage"  # folder of the ledgers of earlier terms
LINEAGE_KEPT = 8  # a ledger grows with its run, and each start leaves one
_SUFFIXES = ("", "-wal", "-shm", "-journal")  # SQLite would take a journal that stays for the next ledger's
_SET_ASIDE = re.compile(r"before_term_(\d+)\.ledger\.db")


def set_ledger_aside(folder: Path, term: int) -> None:
    """Move the ledger that was in use before a term into the lineage, which keeps the last `LINEAGE_KEPT`."""
    lineage = folder / LINEAGE
    lineage.mkdir(exist_ok=True)
    aside = f"before_term_{term}.ledger.db"
    for suffix in _SUFFIXES:
        path = folder / f"ledger.db{suffix}"
        if path.exists():
            path.rename(lineage / f"{aside}{suffix}")
    terms = sorted(int(found[1]) for path in lineage.iterdir() if (found := _SET_ASIDE.fullmatch(path.name)))
    for old in terms[:-LINEAGE_KEPT]:
        for suffix in _SUFFIXES:
            (lineage / f"before_term_{old}.ledger.db{suffix}").unlink(missing_ok=True)


def next_term(folder: Path) -> tuple[int, str]:
    """Take the next term, durably, and a warning if the file of the last one is damaged or gone; "" if it is not.

    Terms start at 0 and are never reused, not even after a start that failed at once.
    """
    path, warning = folder / TERM, ""
    try:
        last = int(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        last = max(_known_terms(folder), default=-1)
        what = "is gone" if isinstance(error, FileNotFoundError) else "is damaged"
        warning = f"{path} {what}: terms go on after {last}, the last in ledgers and checkpoints" if last >= 0 else ""
    partial = folder / f".{TERM}.partial"
    with partial.open("w") as file:
        file.write(str(last + 1))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return last + 1, warning


def _known_terms(folder: Path) -> Iterator[int]:
    """The terms that the folder's other files name."""
    lineage = folder / LINEAGE
    for path in lineage.iterdir() if lineage.is_dir() else ():
        if found := _SET_ASIDE.fullmatch(path.name):
            yield int(found[1])
    yield from checkpoint.terms(folder / "checkpoints")
    if (folder / "ledger.db").exists():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(Ledger(folder / "ledger.db")) as ledger:
            yield ledger.term
