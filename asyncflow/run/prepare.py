"""Prepare a recipe for a run: find its placement if it has none, and check it against its files.

The checks are in `recipe.checks` (algorithm, modes, data) and `recipe.model_checks` (models and their placement).
"""

from __future__ import annotations

import tempfile
import threading

import msgspec

from asyncflow.planner import auto, plan_file
from asyncflow.planner.simulation.scenarios import prompt_lengths
from asyncflow.recipe.checks import Checked, check
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.engine_checks import check_engine
from asyncflow.recipe.model_checks import check_shards

_alone = threading.Lock()  # Python 3.11 may fail when two threads parse code, as two runs that start together do


def prepare(recipe: Recipe) -> Checked:
    """Resolve `placement = "auto"` or a plan's file, and check the recipe against its files. Raises BadInput."""
    with _alone:
        return _prepare(recipe)


def _prepare(recipe: Recipe) -> Checked:
    _check_temporary_folder()
    if recipe.placed_by not in ("", auto.AUTO):
        recipe = plan_file.with_saved_plan(recipe, recipe.placed_by)
    checked = check(auto.check_devices(recipe))
    if not checked.recipe.placed_by:
        return checked
    choice = auto.place(checked.recipe, checked.dataflow, prompt_lengths(checked.train))
    check_shards(choice.chosen.recipe, checked.dataflow)
    check_engine(choice.chosen.recipe)
    return msgspec.structs.replace(checked, recipe=choice.chosen.recipe, plan=plan_file.text_of(choice))


def _check_temporary_folder() -> None:
    """Refuse an environment without a folder for temporary files, which torch, vLLM and Ray need."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise BadInput(f"{error.strerror}: set TMPDIR to a folder that can be written") from error
