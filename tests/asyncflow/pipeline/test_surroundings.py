"""A run needs one folder that it can write: HOME, /tmp and the caches may be read-only, missing or odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.recipe.config import BadInput, recipe_text, to_recipe
from asyncflow.run import run_folder
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import ASYNCFLOW
from tests.disks import with_read_only
from workers.user_code import here

ROOT = str(Path(__file__).parents[3])
READ_ONLY = ["/tmp", "/var/tmp", Path.home(), "/dev/shm"]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(make_recipe(steps=1, data={"eval": ""}, models={"reward": {"rule": "exact_match"}})))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where the command finds a file system that it can write."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def surroundings(home: str, temporary: str) -> dict[str, str]:
    caches = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"), home)
    return {"PYTHONPATH": ROOT, "HOME": home, "TMPDIR": temporary, **caches}


def test_a_run_writes_only_into_its_folder_and_the_one_for_temporary_files(recipe: Path, disk: Path):
    """The path of the latter has a space, and is longer than a socket's may be."""
    temporary = f"{disk}/a b/{'d' * 100}"
    run = [*ASYNCFLOW, "run", str(recipe), "--folder", str(disk / "run")]
    command = ["sh", "-ec", 'mkdir -p "$TMPDIR"; exec "$@"', "sh", *run]
    ended = with_read_only(READ_ONLY, disk, command, surroundings("/dev/null", temporary))
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "run finished after step 1" in ended.stdout


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("disk/run", "set TMPDIR to a folder that can be written"),
        ("run", "/run can't be written: Read-only file system: mount it writable, or choose another folder"),
    ],
)
def test_what_can_not_be_written_is_named_with_what_to_do(recipe: Path, disk: Path, folder: str, said: str):
    temporary = "/absent" if folder == "disk/run" else str(disk)
    command = [*ASYNCFLOW, "run", str(recipe), "--folder", folder]
    ended = with_read_only([*READ_ONLY, Path.cwd()], disk, command, surroundings("/absent", temporary))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(said), line


def test_a_working_directory_that_was_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert here() == []
    with pytest.raises(BadInput, match="recipe: the working directory was removed: change to one that exists"):
        to_recipe({})
    with pytest.raises(BadInput, match="run folder runs/x: the working directory was removed"):
        run_folder.absolute("runs/x")
