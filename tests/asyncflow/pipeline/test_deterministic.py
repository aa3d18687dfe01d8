"""At staleness 0 the pipeline has the weights of a plain loop bit for bit, also after a stop and a resume."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import asyncflow
from asyncflow.control.store.ledger import Ledger
from asyncflow.run.launch import resume
from protocols.control.events import StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline import plain_loop
from tests.asyncflow.pipeline.runs import differing, finished, weights


async def test_five_steps_equal_the_plain_loop_bit_for_bit(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    folder = await finished(recipe)
    policy, critic = plain_loop.train(recipe)
    start = load_file(Path(recipe.models["policy"].path) / "model.safetensors")
    assert differing(start, weights(folder, 5)), "nothing was trained"
    assert differing(weights(folder, 5), policy) == []
    assert differing(weights(folder, 5, "critic"), critic) == []


async def test_a_stopped_and_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(steps=6)
    whole = await finished(recipe)
    async with asyncflow.launch(recipe) as stopped:
        async for event in stopped.events():
            if isinstance(event, StepCommitted) and event.step == 3:
                break
        ended = await stopped.stop()
    assert (ended.outcome, ended.exit_code) == ("stopped", 130)
    assert 3 <= ended.step < 6
    async with resume(stopped.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    for role in ("policy", "critic"):
        assert differing(weights(resumed.folder, 6, role), weights(whole, 6, role)) == [], role


async def test_evaluations_between_the_steps_change_no_bit(make_recipe: MakeRecipe) -> None:
    """Evaluated rows and trained rows never share a forward pass, whose shape would decide the last bits."""
    without, each_step = [await finished(make_recipe(evaluation={"every": every})) for every in (0, 1)]
    for role in ("policy", "critic"):
        assert differing(weights(each_step, 5, role), weights(without, 5, role)) == [], role


async def test_every_sample_of_a_finished_run_has_exactly_one_end(make_recipe: MakeRecipe) -> None:
    ledger = Ledger(await finished(make_recipe()) / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.created, totals.trained, totals.live) == (5 * 4 * 2, 5 * 4 * 2, 0)


async def test_frozen_models_spread_over_ranks_train_the_same(make_recipe: MakeRecipe) -> None:
    """Each rank computes its own rows in other shapes, so the last bits may differ, but nothing else."""
    pools = {"main": {"devices": 1}, "frozen": {"devices": 3}}
    spread = {
        "reference": {"pool": "frozen", "parallel": "1-1-3"},
        "reward": {"pool": "frozen", "parallel": "1-1-2"},
    }
    alone, on_ranks = [
        weights(await finished(make_recipe(pools=pools, placement=placement, steps=3)), 3) for placement in ({}, spread)
    ]
    for name, tensor in alone.items():
        assert torch.allclose(tensor, on_ranks[name], atol=1e-5), name
