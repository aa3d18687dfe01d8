"""A run whose terminal or reader goes away saves and ends; one whose output meets a full disk goes on."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncflow
from asyncflow.cli import driving
from asyncflow.cli.console import ClosableConsole, NotPrinted
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


@pytest.fixture
def full() -> Iterator[ClosableConsole]:
    """A console that prints to a full disk."""
    with Path("/dev/full").open("w") as file:
        yield ClosableConsole(file=file)


def test_a_run_whose_output_meets_a_full_disk_says_so_once_and_goes_on(
    full: ClosableConsole, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = make_recipe(steps=2, checkpoints={"every": 0}, data={"eval": ""})
    with (tmp_path / "errors").open("w") as errors:
        monkeypatch.setattr(driving, "out", full)
        monkeypatch.setattr(driving, "err", ClosableConsole(file=errors))
        ended = driving.drive(asyncflow.launch(recipe, folder=tmp_path / "run"))
    assert (ended.outcome, ended.step) == ("finished", 2)
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("the output can't be written: No space left on device; the run goes on")
    monkeypatch.setattr(driving, "err", full)
    recipe = make_recipe(steps=3, checkpoints={"every": 0}, data={"eval": ""})
    ended = driving.drive(asyncflow.launch(recipe, folder=tmp_path / "run"))
    assert ended.step == 3, "also where errors go to the same disk"


def test_a_command_whose_output_can_not_be_written_fails_with_one_line(full: ClosableConsole):
    with pytest.raises(NotPrinted, match="the output can't be written: No space left on device"):
        full.print("valid")
    full.print("what follows is dropped, and Python's own flush at the end has nothing to write")
    command = ["sh", "-c", 'exec "$@" > /dev/full', "sh", *ASYNCFLOW, "--version"]
    failed = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "error: the output can't be written: No space left on device\n"
