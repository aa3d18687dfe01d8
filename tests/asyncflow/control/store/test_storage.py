"""A write that fails becomes one line: which path, why, and what to do about it."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from asyncflow.control.store.storage import StorageFailed, failure, is_shortage, storing
from asyncflow.services.channels.endpoint import ServiceError


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"it needs at least 2\.0 MB, [\d.]+ MB are free; make room, then resume the run"),
        (errno.EDQUOT, r"it needs at least 2\.0 MB, [\d.]+ MB are free; make room within the quota, then resume"),
        (errno.EFBIG, r"raise the limit on a file's size \(ulimit -f\), then resume the run"),
        (errno.EROFS, "mount it writable, or choose another folder"),
        (errno.EACCES, "let this user write there, or choose another one"),
        (errno.ENOTDIR, "choose another folder"),
    ],
)
def test_each_error_has_its_remedy_whoever_met_it(tmp_path: Path, number: int, advice: str):
    file = str(tmp_path / "ledger.db")
    own = OSError(number, os.strerror(number), file)
    with (
        pytest.raises(StorageFailed, match=rf"^ledger: {file} can't be written: {os.strerror(number)}: {advice}"),
        storing("ledger", tmp_path, needed_bytes=2_000_000),
    ):
        raise own
    theirs = ServiceError(f"policy: SaveState: {type(own).__name__}: {own}")
    assert is_shortage(str(theirs)) == (number != errno.ENOTDIR)
    assert str(failure("ledger", tmp_path, theirs)).count("\n") == 0


def test_a_ledger_that_can_not_be_written_has_a_remedy_too(tmp_path: Path):
    ledger = sqlite3.connect(tmp_path / "ledger.db")
    ledger.execute("create table t (x)")
    ledger.execute("pragma query_only = on")
    with pytest.raises(StorageFailed, match="readonly database: mount it writable"), storing("ledger", tmp_path):
        ledger.execute("insert into t values (1)")
    ledger.close()
