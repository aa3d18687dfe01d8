"""The term of a run rises with every start, so that nothing of an earlier one is taken for its own.

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
_SET_ASIDE = re.compile(r"before_term_(\d+)\.ledger\.db")


def set_aside_name(term: int) -> str:
    """The name in the lineage of the ledger that was in use before a term."""
    return f"before_term_{term}.ledger.db"


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
