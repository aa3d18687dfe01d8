"""trackio's local store has the curves and the texts, and a resumed run goes on in the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from asyncflow.observe.trackers.tables import COLUMNS, rows_of
from tests.asyncflow.observe.trackers import tracked

# In a process of its own, because trackio reads TRACKIO_DIR when it is imported.
PROGRAM = """
import sys
from pathlib import Path

import msgspec

from asyncflow.observe.trackers.trackio import Trackio
from tests.asyncflow.observe.trackers import tracked

folder = Path(sys.argv[1])
tracked.show(Trackio(), tracked.run(folder), range(1, 4))
tracked.show(Trackio(), tracked.run(folder, first_step=3), range(4, 6))

from trackio.sqlite_storage import SQLiteStorage

runs = SQLiteStorage.get_runs("tests")
print(msgspec.json.encode([runs, SQLiteStorage.get_logs("tests", runs[0])]).decode())
"""


def test_a_resumed_run_has_the_curves_and_texts_of_both_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(output.splitlines()) == 1, "trackio itself writes nothing, beside the live view"
    runs, logs = msgspec.json.decode(output)
    assert runs == ["sums-1-012345"]
    assert [(row["step"], row["policy/loss"]) for row in logs if "policy/loss" in row] == [
        (step, -float(step)) for step in range(1, 6)
    ]
    tables = {row["step"]: row["samples"]["_value"] for row in logs if "samples" in row}
    assert tables == {
        step: [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(step, tracked.SAMPLES)] for step in (3, 5)
    }
