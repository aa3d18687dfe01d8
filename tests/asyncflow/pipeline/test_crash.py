"""kill -9 of the whole process group after step 10: the resumed run ends like one that never died (I1, I2, I3, I8)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import recipe_text
from tests.asyncflow.conftest import MakeRecipe
from tests.workers.checkpoints import trained_weights

STEPS, KILL_AFTER = 14, 10
ASYNCFLOW = [sys.executable, "-m", "asyncflow.cli.main"]


@pytest.fixture
def recipe_path(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    # The critic is slowed down so that there is a time after step 10 in which to kill.
    slow = make_recipe(steps=STEPS, checkpoints={"every": 5}, delays={"critic": {"update": 0.1}})
    path.write_text(recipe_text(slow))
    return path


def test_a_killed_and_resumed_run_equals_one_that_never_died(recipe_path: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*ASYNCFLOW, "run", str(recipe_path), "--folder", str(whole)], check=True, stdout=subprocess.DEVNULL)
    _run_and_kill(recipe_path, killed)
    assert not (killed / "policy").exists(), "it was not killed but finished"
    subprocess.run([*ASYNCFLOW, "resume", str(killed)], check=True, stdout=subprocess.DEVNULL)

    for role in ("policy", "critic"):
        ours, theirs = (trained_weights(f / f"checkpoints/step_{STEPS:06d}/{role}") for f in (killed, whole))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{role} {name}"
    assert _ends(killed) == _ends(whole)
    assert all(state == "trained" for state, _ in _ends(killed).values())
    assert [line["step"] for line in read_lines(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))


def _run_and_kill(recipe: Path, folder: Path) -> None:
    process = subprocess.Popen(
        [*ASYNCFLOW, "run", str(recipe), "--folder", str(folder)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(read_lines(folder / "metrics.jsonl")) <= KILL_AFTER:
        assert time.monotonic() < deadline, f"step {KILL_AFTER + 1} was not reached"
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ends(folder: Path) -> dict[int, tuple[str, int]]:
    """sample id -> (state, step) of a ledger."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        return {i: (state, step) for i, state, step in database.execute("SELECT sample_id, state, step FROM samples")}
    finally:
        database.close()
