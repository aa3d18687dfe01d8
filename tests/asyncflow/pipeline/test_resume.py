"""A run goes on: after it died before its first checkpoint, and with other settings where a checkpoint allows them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import asyncflow
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.run.launch import resume
from asyncflow.run.run_folder import recipe_of
from protocols.control.events import RunEnded, RunStarted, StepCommitted, WaitsChanged
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


UPDATES = {"policy.update#1", "critic.update#1"}


async def stopped_in_step(step: int, recipe: Recipe, folder: Path, *, abandon: bool = False) -> RunEnded:
    """Stop a run while it trains a step, counted from 1: not all updates wait for a batch."""
    async with asyncflow.launch(recipe, folder=folder) as run:
        committed = 0
        async for event in run.events():
            committed += isinstance(event, StepCommitted)
            if committed == step - 1 and isinstance(event, WaitsChanged) and not event.waits.keys() >= UPDATES:
                break
        return await run.stop(abandon=abandon)


async def test_a_step_longer_than_the_deadline_of_a_stop_is_given_up_and_the_one_before_saved(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    long = {"policy": {"update": 2.0}, "critic": {"update": 2.0}}
    recipe = make_recipe(steps=2, checkpoints={"every": 0}, deadlines={"stop": 0.1}, delays=long)
    ended = await stopped_in_step(2, recipe, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "step_000001"
    assert (ended.outcome, ended.exit_code, ended.step) == ("stopped", 130, 1)
    assert ended.error == (
        f"not drained within 0.1 s: the step that was training is given up; last checkpoint: {saved}"
    )
    async with resume(tmp_path / "run", overrides=["delays={}"]) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    whole = await finished(make_recipe(steps=2), tmp_path / "whole")
    for role in ("policy", "critic"):
        assert differing(weights(tmp_path / "run", 2, role), weights(whole, 2, role)) == [], role


async def test_a_step_is_given_up_before_the_deadline_where_a_client_asks_for_it(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    long = {"policy": {"update": 2.0}, "critic": {"update": 2.0}}
    recipe = make_recipe(steps=2, checkpoints={"every": 0}, delays=long)
    ended = await stopped_in_step(2, recipe, tmp_path / "run", abandon=True)
    saved = tmp_path / "run" / "checkpoints" / "step_000001"
    assert (ended.outcome, ended.exit_code, ended.step) == ("stopped", 130, 1)
    assert ended.error == f"the step that was training is given up; last checkpoint: {saved}"


async def test_a_step_that_one_of_two_models_has_finished_is_finished_after_the_deadline(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(
        steps=2,
        deadlines={"stop": 1.0},
        delays={"policy": {"update": 3.0}},
        pools={"main": {}, "other": {}},
        placement={"critic": {"pool": "other"}},
    )
    ended = await stopped_in_step(1, recipe, tmp_path / "run")
    assert (ended.outcome, ended.error, ended.step) == ("stopped", "", 1)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()


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
