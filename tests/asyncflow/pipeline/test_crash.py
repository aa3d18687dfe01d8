"""kill -9 of the whole process group after step 10: the resumed run ends like one that never died (I1, I2, I3, I8)."""

from __future__ import annotations

import sqlite3
import subprocess
from pathlib import Path

import pytest

from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import load_recipe, recipe_text
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.observe.trackers.test_tensorboard import curve, read
from tests.asyncflow.pipeline.runs import ASYNCFLOW, differing, finished, run_and_kill, weights

STEPS, KILL_AFTER = 14, 10


@pytest.fixture
def recipe_path(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    # The critic is slow, so that there is time to kill the run between step 10 and its end.
    slow = make_recipe(
        steps=STEPS,
        checkpoints={"every": 5},
        observe={"samples": {"every": 2}, "trackers": ["tensorboard"]},
        delays={"critic": {"update": 0.3}},
    )
    path.write_text(recipe_text(slow))
    return path


async def test_a_killed_and_resumed_run_equals_one_that_never_died(recipe_path: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    await finished(load_recipe(recipe_path, ["delays={}"]), whole)
    run_and_kill(recipe_path, killed, KILL_AFTER + 1)
    subprocess.run([*ASYNCFLOW, "resume", str(killed)], check=True, stdout=subprocess.DEVNULL)

    for role in ("policy", "critic"):
        assert differing(weights(killed, STEPS, role), weights(whole, STEPS, role)) == [], role
    assert _ends(killed) == _ends(whole)
    assert all(state == "trained" for state, _ in _ends(killed).values())
    assert [line["step"] for line in read_lines(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert read_lines(killed / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    assert [line["step"] for line in read_lines(killed / "samples.jsonl")] == [1, *range(2, STEPS + 1, 2)]
    losses = [curve(read(folder / "tensorboard"), "policy/loss") for folder in (killed, whole)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def _ends(folder: Path) -> dict[int, tuple[str, int]]:
    """Sample id -> (state, step) in a run's ledger."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        return {i: (state, step) for i, state, step in database.execute("SELECT sample_id, state, step FROM samples")}
    finally:
        database.close()
