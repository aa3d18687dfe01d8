"""How the benchmarks of learning and of safety run the shipped recipes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from asyncflow.client.run import Run
from asyncflow.recipe.config import Recipe, load_recipe
from asyncflow.run.launch import launch
from protocols.control.events import RunEnded

END = 5  # steps over which the first and the last reward are averaged


def recipe_of(path: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe without checkpoints, with an evaluation before and after the run and none between."""
    return load_recipe(path, ["evaluation.every=0", "checkpoints.every=0", *overrides])


async def run_to_end(recipe: Recipe, folder: Path) -> tuple[Run, RunEnded]:
    """Run a recipe in a new folder, in place of what an interrupted run may have left there."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    async with launch(recipe, folder=folder) as run:
        return run, await run.wait()
