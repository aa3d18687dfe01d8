"""The project's recipes: each passes the checks, and its resolved settings and dataflow are printed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import load_recipe, recipe_text, to_recipe
from asyncflow.recipe.service_specs import compose, stateful

FOLDER = Path(__file__).parents[3] / "deploy" / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*/*.toml") if "algorithm" in tomllib.loads(path.read_text()))

PARALLEL = "_parallel"  # the same algorithm on collective ranks
COLOCATED = "_colocated"  # the same with models that share a device
STATEFUL = {"ppo": ["critic", "policy"], "safe_rlhf": ["critic", "cost_critic", "policy", "advantage"]}


def here(path: Path, models: Path, data: Path) -> list[str]:
    """Overrides that replace the files of a demonstration by small ones."""
    own = [f"data.train='{data}/train.jsonl'", f"data.eval='{data}/heldout.jsonl'"]
    for role, model in tomllib.loads(path.read_text())["models"].items():
        if "path" in model:
            own.append(f"models.{role}.path='{models}/{'reward' if role in ('reward', 'cost') else 'policy'}'")
    if path.stem.endswith(PARALLEL):  # the small models' vocabulary is odd, so it can't be sharded over tensor ranks
        own.append("placement.policy.parallel='2-1-2'")
    return own


def test_every_algorithm_has_a_recipe_for_the_same_task():
    assert {path.stem for path in RECIPES if path.parent.name == "arithmetic"} == ALGORITHMS.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_sound(path: Path, models: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(path.parent))  # where a recipe's own rules are
    recipe = load_recipe(path, here(path, models, data))
    if path.parent.name != "smollm2":  # whose recipes are called by what they show, and sized for a laptop
        algorithm = path.stem.removesuffix(PARALLEL).removesuffix(COLOCATED)
        assert (recipe.algorithm, recipe.samples_per_step) == (algorithm, 256)
    checked = check(recipe)
    assert set(recipe.models) == {s for s in checked.dataflow.services if s != "advantage"}, "no model but those called"
    specs = compose(checked.recipe, checked.dataflow, recipe.name, 0, "logs")
    assert {"policy", "advantage", "evaluator", *recipe.placement} <= {spec.name for spec in specs}
    assert stateful(checked.dataflow) == STATEFUL.get(recipe.algorithm, ["policy"])
    assert "policy.update#1" in checked.dataflow.draw()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_resolved_recipe_reads_as_itself(path: Path):
    recipe = load_recipe(path)
    assert to_recipe(tomllib.loads(recipe_text(recipe))) == recipe
