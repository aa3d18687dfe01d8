"""Safe-RLHF end to end: two critics, and a multiplier that moves once per step and survives a stop and a kill."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import asyncflow
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import StepCommitted
from tests.asyncflow.pipeline.runs import differing, finished, metric, weights

STEPS = 4
RULES = "tests.asyncflow.pipeline.rules"
TRAINED = ("policy", "critic", "cost_critic")

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """A recipe of Safe-RLHF with a reward model and a cost rule, whose limit the random policy exceeds."""

    def make(**changes: Any) -> Recipe:
        costs = {"cost": {"rule": f"{RULES}:varied"}, "cost_critic": table["models"]["critic"]}
        numbers = {"cost_limit": -0.5, "multiplier_rate": 0.5, "cost_window": 12}
        own = {"algorithm": "safe_rlhf", "steps": STEPS, "models": table["models"] | costs, "advantage": numbers}
        return to_recipe(table | own | changes)

    return make


def assert_same(ours: Path, theirs: Path, roles: Sequence[str] = TRAINED) -> None:
    """Two runs have the same final weights."""
    for role in roles:
        assert differing(weights(ours, STEPS, role), weights(theirs, STEPS, role)) == [], role


def state(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step_{step:06d}" / "advantage" / "state.json").read_text())


async def test_the_multiplier_follows_the_cost_and_both_critics_learn_their_own(recipe_of: MakeOf):
    folder = await finished(recipe_of())
    multipliers, excesses = metric(folder, "multiplier"), metric(folder, "cost_excess")
    for before, after, excess in zip([1.0, *multipliers], multipliers, excesses, strict=False):
        assert after == pytest.approx(min(before * math.exp(0.5 * before * excess), 5.0))
    assert any(excess > 0 for excess in excesses)
    assert state(folder)["value"] == multipliers[-1]
    assert len(state(folder)["costs"]) == 12  # the last 12, of 8 per step
    assert all(cost > 0 for cost in metric(folder, "cost_critic.loss"))
    assert differing(weights(folder, STEPS, "critic"), weights(folder, STEPS, "cost_critic"))


async def test_a_step_reports_the_mean_cost_of_its_samples(recipe_of: MakeOf):
    folder = await finished(recipe_of(steps=1, advantage={"cost_limit": 0.25, "cost_window": 8}))
    (cost,), (excess,) = metric(folder, "cost_mean"), metric(folder, "cost_excess")
    assert cost - 0.25 == pytest.approx(excess)


async def test_a_multiplier_of_zero_is_ppo_bit_for_bit(recipe_of: MakeOf, table: dict[str, Any]):
    safe = await finished(recipe_of(advantage={"multiplier": 0.0, "kl_coefficient": 0.1}))
    plain = await finished(to_recipe(table | {"steps": STEPS, "advantage": {"kl_coefficient": 0.1}}))
    assert metric(safe, "multiplier") == [0.0] * STEPS
    assert_same(safe, plain, ("policy", "critic"))


async def test_a_stopped_run_resumes_with_its_multiplier(recipe_of: MakeOf):
    recipe = recipe_of()
    whole = await finished(recipe)
    async with asyncflow.launch(recipe) as stopped:
        async for event in stopped.events():
            if isinstance(event, StepCommitted):
                break
        ended = await stopped.stop()
    assert (ended.outcome, 1 <= ended.step < STEPS) == ("stopped", True)
    async with resume(stopped.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    assert metric(resumed.folder, "multiplier") == metric(whole, "multiplier")
    assert state(resumed.folder) == state(whole)
    assert_same(resumed.folder, whole)


async def test_a_run_that_was_cut_off_goes_on_from_the_multiplier_of_its_checkpoint(recipe_of: MakeOf, tmp_path: Path):
    """Step 3 was committed and is trained again; its costs count once."""
    whole = await finished(recipe_of())
    folder, reached = tmp_path / "cut", asyncio.Event()
    slow = recipe_of(checkpoints={"every": 2}, delays={"cost_critic": {"update": 0.3}})

    async def run() -> None:
        async with asyncflow.launch(slow, folder=folder) as cut:
            async for event in cut.events():
                if isinstance(event, StepCommitted) and event.step == 3:
                    reached.set()

    running = asyncio.create_task(run())
    await reached.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_000002"]
    assert state(folder, 2)["value"] == metric(whole, "multiplier")[1]
    async with resume(folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    assert metric(folder, "multiplier") == metric(whole, "multiplier")
    assert_same(folder, whole)
