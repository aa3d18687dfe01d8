"""`recompute`: the planner chooses it, a recipe sets it, the worker applies it, and a step stays the same."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from asyncflow.planner.auto import place
from asyncflow.planner.calibration.calibration import Calibration
from asyncflow.planner.calibration.machine import CalibrationSizes
from asyncflow.planner.calibration.worker_harness import WorkerHarness
from asyncflow.planner.costs.devices import CATALOGUE
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.scenarios import of_recipe
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput
from tests.asyncflow.conftest import MakeRecipe
from workers.parallel import whole_module

A100 = CATALOGUE["A100-80G"]


def step_of(make_recipe: MakeRecipe, role: str, recompute: bool) -> dict[str, torch.Tensor]:
    """The weights after one step of a role."""
    checked = check(make_recipe(placement={role: {"pool": "main", "recompute": recompute}}))
    with closing(WorkerHarness(checked.recipe, checked.dataflow, checked.train, CalibrationSizes(), {role})) as harness:
        worker = harness.loaded[role].worker
        worker.update(harness.experience(4, 3))
        return worker.trained.collect()


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_recipe_says_recompute_and_the_step_is_the_same(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, role: str
):
    recomputed = 0

    def counted(*inputs: Any, **options: Any) -> Any:
        nonlocal recomputed
        recomputed += 1
        return checkpoint(*inputs, **options)

    monkeypatch.setattr(whole_module, "checkpoint", counted)
    kept = step_of(make_recipe, role, recompute=False)
    assert not recomputed
    again = step_of(make_recipe, role, recompute=True)
    assert recomputed
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_where_memory_is_short_auto_writes_recompute_into_the_placement(make_recipe: MakeRecipe):
    recipe = make_recipe(deterministic=False, runtime="ray", placement="auto", pools={"main": {"devices": 1}})
    dataflow = check(msgspec.structs.replace(recipe, placed_by="")).dataflow

    def recomputes(memory_bytes: float) -> bool | None:
        device = msgspec.structs.replace(A100, memory_bytes=memory_bytes)
        try:
            choice = place(recipe, dataflow, Lengths.fixed(8), Calibration(device))
        except BadInput:
            return None
        return choice.chosen.recipe.placement["policy"].recompute

    short, enough = 1e4, 1e9
    assert recomputes(enough) is False
    while enough > 1.005 * short:  # the least memory on which the models fit
        middle = (short * enough) ** 0.5
        short, enough = (middle, enough) if recomputes(middle) is None else (short, middle)
    assert recomputes(enough) is True


def test_a_simulated_step_takes_longer_where_activations_are_recomputed(make_recipe: MakeRecipe):
    kept, again = (
        check(make_recipe(pools={"main": {}}, placement={"policy": {"pool": "main", "recompute": recompute}}))
        for recompute in (False, True)
    )
    seconds = [
        of_recipe(one.recipe, one.dataflow, Lengths.fixed(8), Calibration(A100)).speeds["policy"].update_s([64, 64])
        for one in (kept, again)
    ]
    assert seconds[1] > seconds[0]
