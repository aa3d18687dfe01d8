"""A run whose terminal or reader goes away finishes its step, writes a checkpoint and ends."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from asyncflow.control.store import checkpoint
from asyncflow.recipe.config import recipe_text
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import ASYNCFLOW


@pytest.mark.parametrize("loss", ["reader", "terminal"])
def test_a_run_that_loses_its_reader_or_its_terminal_saves_what_it_has(
    make_recipe: MakeRecipe, tmp_path: Path, loss: str
):
    """Its standard input is closed, too: a file of the run must not take that descriptor's place."""
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(recipe_text(make_recipe(steps=10_000, checkpoints={"every": 0}, data={"eval": ""})))
    default = ["env", "--default-signal=HUP"]  # under nohup it is ignored, and children inherit that
    command = [*default, "sh", "-c", 'exec "$@" <&-', "sh", *ASYNCFLOW, "run", str(recipe), "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not (line := process.stdout.readline()).startswith("step 1/"):
            assert line, process.stderr.read()
        if loss == "reader":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGHUP)
        told = process.stderr.read().splitlines()
        if loss == "terminal":
            process.stdout.read()
        assert process.wait(60) == 130, told
    expected = ["nobody reads the output any more"] * (loss == "reader")
    assert told[:-1] == [
        *expected,
        "draining: finishing the current step and writing a checkpoint; interrupt again to give that step up",
    ]
    assert told[-1] == f"to go on: asyncflow resume {folder}"
    _, manifest, damaged = checkpoint.newest(folder / "checkpoints")
    assert manifest.step >= 1
    assert damaged == []
