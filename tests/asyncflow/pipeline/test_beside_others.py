"""Runs live with what else is in their program: another run, a loop that runs already, the program's own Ray."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import uvloop

import asyncflow
from asyncflow.recipe.config import Recipe, to_recipe
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import finished

WITHOUT_EVALUATION = {"data": {"eval": ""}, "checkpoints": {"every": 0}}


async def two_runs(make_recipe: MakeRecipe, folder: Path, **changes: object) -> None:
    """A run of one step beside a run of five; each has its own log."""
    recipes = {
        name: make_recipe(name=name, steps=steps, **WITHOUT_EVALUATION, **changes) for name, steps in RUNS.items()
    }
    await asyncio.gather(*(finished(recipe, folder / name) for name, recipe in recipes.items()))
    for name, steps in RUNS.items():
        lines = (folder / name / "logs" / "controller.log").read_text().splitlines()
        others = [other for other in RUNS if other != name]
        assert not [line for line in lines if any(f"/{other}" in line for other in others)]
        assert sum("reward" in line and f"/{steps} " in line for line in lines) == steps, lines


RUNS = {"short": 1, "long": 5}


async def test_two_runs_in_one_program_have_a_log_of_their_own_and_leave_the_programs_logging_as_it_was(
    make_recipe: MakeRecipe, tmp_path: Path
):
    before = [(log.level, log.propagate, list(log.handlers)) for log in (logging.getLogger("asyncflow"), logging.root)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    await two_runs(make_recipe, tmp_path)
    after = [(log.level, log.propagate, list(log.handlers)) for log in (logging.getLogger("asyncflow"), logging.root)]
    assert after == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
async def test_the_run_that_ends_first_leaves_the_other_ones_ray_alone(table: dict[str, Any], tmp_path: Path):
    """Their folders have the same name, too: the names of their actors must not meet."""
    import ray

    models = {name: table["models"][name] for name in ("policy", "reference")} | {"reward": {"rule": "exact_match"}}
    free = {"runtime": "ray", "deterministic": False, "advantage": {}}
    grpo = table | WITHOUT_EVALUATION | free | {"algorithm": "grpo", "models": models}
    recipes = [to_recipe(grpo | {"data": table["data"] | {"eval": ""}, "steps": steps}) for steps in (1, 6)]
    await asyncio.gather(*(finished(recipe, tmp_path / str(i) / "r") for i, recipe in enumerate(recipes)))
    assert not ray.is_initialized(), "the last run ends the Ray that the first one started"


async def test_a_running_loop_starts_runs_one_after_the_other_also_after_an_error_of_its_own(
    make_recipe: MakeRecipe, tmp_path: Path
):
    """As in the cells of a notebook."""
    recipe = make_recipe(steps=1, **WITHOUT_EVALUATION)
    with pytest.raises(ZeroDivisionError):
        async with asyncflow.launch(recipe, folder=tmp_path / "a"):
            _ = 1 / 0
    await finished(recipe, tmp_path / "b")


def test_a_thread_of_the_program_runs_one_on_its_own_loop(make_recipe: MakeRecipe, tmp_path: Path):
    errors: list[BaseException] = []

    def run(recipe: Recipe) -> None:
        try:
            uvloop.run(finished(recipe, tmp_path / "run"))
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    thread = threading.Thread(target=run, args=(make_recipe(steps=1, **WITHOUT_EVALUATION),))
    thread.start()
    thread.join()
    assert not errors
