"""A log takes bounded room, whatever else in its process writes to the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.observe import log
from asyncflow.observe.log import close_log, open_log


def test_a_log_that_is_too_large_is_set_aside_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log, "LOG_BYTES", 2_000)
    path, before = tmp_path / "logs" / "policy.log", tmp_path / "logs" / "policy.log.1"
    own = open_log(path)
    with path.open("a", buffering=1) as output:  # as the output of an actor's process
        for line in range(100):
            own.info("line %d", line)
            output.write(f"printed {line}\n")
    close_log(own)
    assert sorted(p.name for p in path.parent.iterdir()) == ["policy.log", "policy.log.1"]
    assert path.stat().st_size <= 2_100
    assert before.stat().st_size <= 2_100
    kept = before.read_text() + path.read_text()
    first = min(int(line.rpartition(" ")[2]) for line in kept.splitlines())
    for line in range(first + 1, 100):
        assert f"INFO line {line}\n" in kept
        assert f"printed {line}\n" in kept
    assert "\0" not in kept, "who else appends goes on at the new end"
