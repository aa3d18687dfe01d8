"""At staleness 0 the pipeline is the plain loop: the same weights, bit for bit, also through a stop and a resume."""

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
from tests.workers.checkpoints import trained_weights


def _final(folder: Path, step: int, role: str) -> dict[str, torch.Tensor]:
    return trained_weights(folder / "checkpoints" / f"step_{step:06d}" / role)


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{name} differs by {(tensor - theirs[name]).abs().max():.3g}"


async def test_five_steps_equal_the_plain_loop_bit_for_bit(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    async with asyncflow.launch(recipe) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    policy, critic = plain_loop.train(recipe)
    start = load_file(Path(recipe.models["policy"].path) / "model.safetensors")
    trained = _final(run.folder, 5, "policy")
    assert any(not torch.equal(trained[n], t) for n, t in start.items()), "nothing was trained"
    _assert_same(trained, policy)
    _assert_same(_final(run.folder, 5, "critic"), critic)


async def test_a_stopped_and_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe(steps=6)
    async with asyncflow.launch(recipe) as whole:
        await whole.wait()
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
        _assert_same(_final(resumed.folder, 6, role), _final(whole.folder, 6, role))


async def test_evaluations_between_the_steps_change_no_bit(make_recipe: MakeRecipe) -> None:
    """Rows that are evaluated and rows that are trained never share a forward: its shape decides the last bit."""
    final = []
    for every in (0, 1):
        async with asyncflow.launch(make_recipe(evaluation={"every": every})) as run:
            assert (await run.wait()).outcome == "finished"
        final.append(run.folder)
    for role in ("policy", "critic"):
        _assert_same(_final(final[1], 5, role), _final(final[0], 5, role))


async def test_every_sample_of_a_finished_run_has_exactly_one_end(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe()) as run:
        await run.wait()
    ledger = Ledger(run.folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.created, totals.trained, totals.live) == (5 * 4 * 2, 5 * 4 * 2, 0)


async def test_models_that_only_answer_train_the_same_when_they_are_spread_over_ranks(make_recipe: MakeRecipe) -> None:
    """Each rank works on its own rows: other shapes, so the last bits may differ, and nothing else."""
    pools = {"main": {"devices": 1}, "judges": {"devices": 3}}
    spread = {
        "reference": {"pool": "judges", "parallel": "1-1-3"},
        "reward": {"pool": "judges", "parallel": "1-1-2"},
    }
    final = []
    for placement in ({}, spread):
        async with asyncflow.launch(make_recipe(pools=pools, placement=placement, steps=3)) as run:
            ended = await run.wait()
        assert ended.outcome == "finished", ended.error
        final.append(_final(run.folder, 3, "policy"))
    for name, tensor in final[0].items():
        assert torch.allclose(tensor, final[1][name], atol=1e-5), name
