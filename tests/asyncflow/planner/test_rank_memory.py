"""The estimated memory of a recipe's services, from its own dtypes and backends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from asyncflow.planner.costs.memory import Footprint
from asyncflow.planner.rank_memory import RankMemory, pool_bytes, rank_memory
from asyncflow.planner.simulation.scenarios import shapes_of
from asyncflow.recipe.config import Recipe
from asyncflow.run.prepare import prepare
from tests import families
from tests.asyncflow.conftest import MakeRecipe
from workers.data.folder_tensors import stored_tensors

RANKS = {"runtime": "ray", "deterministic": False, "pools": {"main": {"devices": 2}}}


def memory_of(recipe: Recipe, service: str) -> RankMemory:
    return next(one for one in rank_memory(prepare(recipe)) if one.service == service)


def footprint_of(recipe: Recipe, service: str) -> Footprint:
    footprint = memory_of(recipe, service).footprint
    assert footprint is not None
    return footprint


def test_a_trained_model_has_weights_gradients_and_two_moments(make_recipe: MakeRecipe):
    recipe = make_recipe()
    parameters = shapes_of(recipe)["policy"].parameters
    found = footprint_of(recipe, "policy")
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    reference = footprint_of(recipe, "reference")
    assert (reference.weights, reference.gradients, reference.optimizer) == (4 * parameters, 0, 0)


@pytest.mark.parametrize(
    ("backend", "shares"), [("3d", (4, 4, 8)), ("zero1", (4, 4, 4)), ("zero2", (4, 2, 4)), ("fsdp", (2, 2, 4))]
)
def test_two_replicas_divide_what_their_backend_divides(
    make_recipe: MakeRecipe, backend: str, shares: tuple[int, int, int]
):
    recipe = make_recipe(placement={"critic": {"pool": "main", "parallel": "1-1-2", "backend": backend}}, **RANKS)
    parameters, found = shapes_of(recipe)["critic"].parameters, footprint_of(recipe, "critic")
    assert (found.weights, found.gradients, found.optimizer) == tuple(share * parameters for share in shares)


@pytest.mark.parametrize(
    ("backend", "shares"), [("3d", (2, 4, 12)), ("zero1", (2, 4, 6)), ("zero2", (2, 2, 6)), ("fsdp", (0, 2, 6))]
)
def test_in_bfloat16_masters_are_where_they_are_stepped(
    make_recipe: MakeRecipe, backend: str, shares: tuple[int, int, int]
):
    critic = {"path": make_recipe().models["critic"].path, "learning_rate": 1e-3, "dtype": "bfloat16"}
    placement = {"critic": {"pool": "main", "parallel": "1-1-2", "backend": backend}}
    recipe = make_recipe(models={"critic": critic}, placement=placement, **RANKS)
    parameters, found = shapes_of(recipe)["critic"].parameters, footprint_of(recipe, "critic")
    assert (found.weights, found.gradients, found.optimizer) == tuple(share * parameters for share in shares)


def test_adapters_train_little(make_recipe: MakeRecipe):
    whole, adapted = make_recipe(), make_recipe(models={"policy": {**_policy(make_recipe()), "lora": {"rank": 2}}})
    assert footprint_of(adapted, "policy").weights == footprint_of(whole, "policy").weights
    assert 0 < footprint_of(adapted, "policy").optimizer < 0.2 * footprint_of(whole, "policy").optimizer


def test_a_rule_and_the_advantages_need_no_device(make_recipe: MakeRecipe):
    recipe = make_recipe(models={"reward": {"rule": "exact_match"}})
    assert (memory_of(recipe, "reward").pool, memory_of(recipe, "reward").model) == ("", "exact_match")
    assert memory_of(recipe, "advantage").pool == ""


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_family_whose_config_describes_no_dense_decoder_is_estimated_by_its_tensors(
    make_recipe: MakeRecipe, tmp_path: Path, family: str
):
    folder = families.make(family, tmp_path / family)
    parameters = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    models = {role: {"path": str(folder), "learning_rate": 1e-4} for role in ("policy", "critic")}
    recipe = make_recipe(models={**models, "reference": {"path": str(folder)}, "reward": {"rule": "exact_match"}})
    policy, reference = (memory_of(recipe, role) for role in ("policy", "reference"))
    assert policy.footprint == Footprint(4 * parameters, 8 * parameters, 4 * parameters, 0.0)
    assert reference.footprint == Footprint(4 * parameters, 0.0, 0.0, 0.0)
    assert policy.why.startswith("activations not estimated (shape")
    adapted = make_recipe(models=recipe_models(models, folder, rank=1))
    trained = footprint_of(adapted, "policy").gradients / 4
    assert 0 < trained < 0.2 * parameters


def recipe_models(models: dict[str, dict[str, Any]], folder: Path, rank: int) -> dict[str, Any]:
    """The models of a recipe with one folder for all, whose policy trains adapters."""
    policy = {**models["policy"], "lora": {"rank": rank}}
    return {**models, "policy": policy, "reference": {"path": str(folder)}, "reward": {"rule": "exact_match"}}


def test_a_device_holds_what_all_keep_and_the_most_that_one_adds():
    one = RankMemory("a", "main", 1, "1-1-1", "", Footprint(10.0, 20.0, 5.0, 1.0), cache_bytes=3.0)
    other = RankMemory("b", "main", 1, "1-1-1", "", Footprint(1.0, 0.0, 0.0, 100.0))
    elsewhere = RankMemory("c", "other", 1, "1-1-1", "", Footprint(1e9, 0.0, 0.0, 0.0))
    assert pool_bytes([one, other, elsewhere], "main") == 10 + 20 + 3 + 1 + 100


def _policy(recipe: Recipe) -> dict[str, object]:
    return {"path": recipe.models["policy"].path, "learning_rate": recipe.models["policy"].learning_rate}
