"""What a run folder says about its run, from the outside."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import asyncflow
from asyncflow.cli.runs import print_runs, stop
from asyncflow.control.store.run_log import ENDED
from asyncflow.recipe.config import BadInput, recipe_text
from asyncflow.run.run_folder import locked
from asyncflow.run.run_status import runs_in, status_of
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import ASYNCFLOW, finished

SHORT = {"steps": 2, "checkpoints": {"every": 1}}


async def test_a_runs_status_is_read_from_its_folder_while_it_runs_and_afterwards(
    make_recipe: MakeRecipe, tmp_path: Path
):
    folder = tmp_path / "one"
    async with asyncflow.launch(make_recipe(**SHORT), folder=folder) as run:
        running = status_of(folder)
        await run.wait()
    assert (running.state, running.process) == ("running", os.getpid())
    status = status_of(folder)
    assert (status.state, status.step, status.steps, status.process, status.error) == ("finished", 2, 2, 0, "")
    assert status.samples == {"trained": 16}
    assert set(status.evaluations) == {"exact_match"}
    assert Path(status.checkpoint).name == "step_000002"
    assert "finished after step 2" in (folder / "report.html").read_text()


async def test_a_run_that_goes_on_has_not_ended(make_recipe: MakeRecipe, tmp_path: Path):
    folder = tmp_path / "one"
    await finished(make_recipe(**SHORT), folder)
    async with asyncflow.resume(folder, overrides=["steps=3"]) as run:
        assert status_of(folder).state == "running"
        assert not (folder / ENDED).exists()
        await run.wait()
    assert (status_of(folder).state, status_of(folder).step) == ("finished", 3)


def test_a_run_is_stopped_from_outside_and_a_killed_one_reads_as_killed(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(make_recipe(steps=10_000, checkpoints={"every": 0}, data={"eval": ""})))

    def ended_by(name: str, kill: bool) -> Path:
        folder = tmp_path / name
        command = [*ASYNCFLOW, "run", str(recipe), "--folder", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith("step 1/"):
                assert line
            assert status_of(folder).process == process.pid
            if kill:
                process.send_signal(signal.SIGKILL)
            else:
                stop(folder)
            process.stdout.read()
        return folder

    stopped = status_of(ended_by("stopped", kill=False))
    assert (stopped.state, stopped.error) == ("stopped", "")
    assert stopped.checkpoint
    killed = status_of(ended_by("killed", kill=True))
    assert (killed.state, killed.process, killed.checkpoint) == ("killed", 0, "")
    assert killed.step >= 1
    with pytest.raises(BadInput, match="is not running: it is killed after step"):
        stop(tmp_path / "killed")

    assert [folder.name for folder in runs_in(tmp_path)] == ["killed", "stopped"]
    console = Console(record=True, width=120)
    print_runs(tmp_path, as_json=False, console=console)
    text = console.export_text()
    assert text.index("killed ") < text.index("stopped "), "the one that started last stands first"


def test_a_run_on_another_machine_is_running_and_no_process_of_this_one_is_signalled(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('name = "far"')
    with locked(tmp_path):
        (tmp_path / "run.lock").write_text(f"{os.getpid()} another-machine")
        status = status_of(tmp_path)
        assert (status.state, status.process, status.host) == ("running", os.getpid(), "another-machine")
        with pytest.raises(BadInput, match="runs on another-machine, process"):
            stop(tmp_path)


def test_a_run_whose_files_are_damaged_is_told_and_the_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, text in (("good", 'name = "good"'), ("bad", "name =")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(text)
    console = Console(record=True, width=120)
    print_runs(tmp_path, as_json=False, console=console)
    assert "good" in console.export_text()
    assert "bad: can't be read: TOMLDecodeError" in capsys.readouterr().err
    (tmp_path / "good" / "ledger.db").write_text("no database" * 100)
    with pytest.raises(BadInput, match="can't be read: DatabaseError: file is not a database"):
        status_of(tmp_path / "good")


def test_a_folder_without_a_run_is_told(tmp_path: Path):
    with pytest.raises(BadInput, match=r"is no run folder: it has no recipe\.toml"):
        status_of(tmp_path)
    with pytest.raises(BadInput, match="holds no run"):
        runs_in(tmp_path)
