"""A run goes on: after it died before its first checkpoint, and with other settings where a checkpoint allows them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import asyncflow
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.run.launch import resume
from asyncflow.run.run_folder import recipe_of
from protocols.control.events import RunStarted, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import differing, finished, weights


async def die_after(recipe: Recipe, folder: Path, step: int) -> None:
    """Start a run and end it at once, without a checkpoint, when it has committed a step."""
    with pytest.raises(asyncio.CancelledError):
        async with asyncflow.launch(recipe, folder=folder) as run:
            async for event in run.events():
                if isinstance(event, StepCommitted) and event.step == step:
                    raise asyncio.CancelledError


async def test_a_run_that_died_before_its_first_checkpoint_starts_again_by_the_same_call(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(steps=2)
    await die_after(recipe, tmp_path / "died", 1)
    async with asyncflow.launch(recipe, folder=tmp_path / "died") as run:
        events = [event async for event in run.events()]
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.term, started.first_step) == (1, 0)
    assert started.warnings[0].startswith("starts from the beginning, 1 steps are trained again")
    whole = await finished(recipe, tmp_path / "whole")
    assert differing(weights(tmp_path / "died", 2), weights(whole, 2)) == []


async def test_a_finished_run_goes_on_with_more_steps_and_another_learning_rate(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = await finished(make_recipe(steps=1), tmp_path / "run")
    async with resume(folder, overrides=["steps=2", "models.policy.learning_rate=5e-4"]) as run:
        assert (await run.wait()).outcome == "finished"
    assert [step.step for step in run.metrics] == [2]
    assert recipe_of(folder).models["policy"].learning_rate == 5e-4
    with pytest.raises(BadInput, match="does not allow seed: 7 -> 8"):
        async with resume(folder, overrides=["seed=8"]):
            pytest.fail("a run went on with other samples under the same ids")
