"""A run on a disk that fills up: it ends with one line, keeps its last checkpoint, and goes on once there is room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncflow
from asyncflow.control.store import checkpoint
from protocols.control.events import CheckpointWritten, RunEnded, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.disks import mounted

DISK_BYTES = 32 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    with mounted(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


@pytest.mark.parametrize("left", [1 << 20, 0], ids=["too little for a checkpoint", "nothing left"])
async def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(make_recipe: MakeRecipe, small_disk: Path, left: int):
    recipe = make_recipe(steps=6, checkpoints={"every": 1, "keep": 1}, data={"eval": ""})
    folder, filler = small_disk / "run", small_disk / "another program's"
    async with asyncflow.launch(recipe, folder=folder) as run:
        async for event in run.events():
            if isinstance(event, CheckpointWritten) and not filler.exists():
                fill(filler, left)
        ended = await run.wait()
    assert ended.outcome == "failed"
    assert ended.exit_code == 1
    assert len(ended.error.splitlines()) == 1, ended.error
    assert str(folder) in ended.error
    assert "No space left on device" in ended.error or "database or disk is full" in ended.error
    assert "MB are free; make room, then resume the run" in ended.error
    assert left == 0 or "needs " in ended.error
    path, manifest, damaged = checkpoint.newest(folder / "checkpoints")
    assert (manifest.step, damaged) == (1, [])
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000001"], "nothing partial is left"

    filler.unlink()
    async with asyncflow.resume(folder) as run:
        events = [event async for event in run.events()]
    assert isinstance(events[-1], RunEnded)
    assert events[-1].outcome == "finished", events[-1].error
    assert [event.step for event in events if isinstance(event, StepCommitted)] == [2, 3, 4, 5, 6]


def fill(path: Path, left: int) -> None:
    """Write a file that leaves so many bytes of its file system free."""
    with path.open("wb", buffering=0) as file:
        try:
            while room := shutil.disk_usage(path).free - left:
                file.write(bytes(max(room, 0)))
        except OSError:
            assert not left


async def test_a_disk_without_room_for_a_first_checkpoint_is_named_as_well(make_recipe: MakeRecipe, small_disk: Path):
    """A process of its own may write it, whose error is a text."""
    recipe = make_recipe(steps=2, checkpoints={"every": 1}, data={"eval": ""})
    folder = small_disk / "run"
    async with asyncflow.launch(recipe, folder=folder) as run:
        fill(small_disk / "another program's", 1 << 20)
        ended = await run.wait()
    assert ended.error.startswith(f"checkpoint of step 1: {folder / 'checkpoints'} can't be written: "), ended.error
    assert len(ended.error.splitlines()) == 1
    assert "No space left on device" in ended.error
    assert not [path for path in (folder / "checkpoints").iterdir() if "partial" in path.name]
