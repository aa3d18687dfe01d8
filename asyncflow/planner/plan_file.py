"""Plan files: chosen pools and placement as TOML, which a recipe loads with `placement = "PATH"`.

The file may be edited; it passes the same checks as a placement written in the recipe.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import tomli_w

from asyncflow.planner.auto import PlacementChoice
from asyncflow.recipe.config import BadInput, Placed, Pool, Recipe, to_settings
from workers.settings import Settings


class SavedPlan(Settings, frozen=True):
    """The contents of a plan file: the pools and the placement of a recipe."""

    pools: dict[str, Pool]
    placement: dict[str, Placed]
    predicted_step_seconds: float = 0.0
    chosen_on: str = ""


def text_of(choice: PlacementChoice) -> str:
    """A choice as the TOML text of a plan file."""
    recipe = choice.chosen.recipe
    saved = SavedPlan(
        pools=recipe.pools,
        placement=recipe.placement,
        predicted_step_seconds=round(choice.chosen.simulated.step_s, 6),
        chosen_on=choice.devices,
    )
    return tomli_w.dumps(msgspec.to_builtins(saved))


def with_saved_plan(recipe: Recipe, path: str) -> Recipe:
    """A recipe with the pools and the placement of a plan file. Raises BadInput."""
    try:
        table = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"placement = {path!r}: neither 'auto' nor a plan file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"placement = {path!r}: {error}") from error
    saved = to_settings(table, SavedPlan, f"placement = {path!r}")
    return msgspec.structs.replace(recipe, pools=saved.pools, placement=saved.placement, placed_by="")
