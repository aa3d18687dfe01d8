"""What a server remembers, where writing fails."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from asyncflow.server.records import Records


async def test_what_fails_half_way_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "server.db"
    records = Records(path)
    other = sqlite3.connect(path, isolation_level=None, timeout=0.1)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'the disk is full'); END")
    with pytest.raises(sqlite3.Error, match="the disk is full"):
        await records.restart("one", 1, [], "the-key", "request")
    assert await records.runs() == []
    other.execute("DROP TRIGGER full")
    other.close()
    assert await records.restart("one", 1, [], "the-key", "request")
    assert [run.name for run in await records.runs()] == ["one"]
    records.close()
