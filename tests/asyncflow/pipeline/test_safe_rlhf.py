"""Safe-RLHF end to end: two critics and a multiplier that moves once a step and survives a stop and a kill."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncflow
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import StepCommitted
from tests.workers.checkpoints import trained_weights

STEPS = 4
RULES = "tests.asyncflow.pipeline.rules"
TRAINED = ("policy", "critic", "cost_critic")

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """Safe-RLHF with a reward model and a rule for the cost, whose limit the random policy does not keep."""

    def make(**changes: Any) -> Recipe:
        costs = {"cost": {"rule": f"{RULES}:telling"}, "cost_critic": table["models"]["critic"]}
        numbers = {"cost_limit": -0.5, "multiplier_rate": 0.5, "cost_window": 12}
        own = {"algorithm": "safe_rlhf", "steps": STEPS, "models": table["models"] | costs, "advantage": numbers}
        return to_recipe(table | own | changes)

    return make


async def finished(recipe: Recipe) -> Path:
    async with asyncflow.launch(recipe) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    return run.folder


def weights(folder: Path, role: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return trained_weights(folder / "checkpoints" / f"step_{step:06d}" / role)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def told(folder: Path, name: str) -> list[float]:
    """A metric, step by step."""
    return [line[name] for line in read_lines(folder / "metrics.jsonl")]


def state(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step_{step:06d}" / "advantage" / "state.json").read_text())


async def test_the_multiplier_follows_the_cost_and_both_critics_learn_their_own(recipe_of: MakeOf):
    folder = await finished(recipe_of())
    multipliers, excesses = told(folder, "multiplier"), told(folder, "cost_excess")
    for before, after, excess in zip([1.0, *multipliers], multipliers, excesses, strict=False):
        assert after == pytest.approx(min(before * math.exp(0.5 * before * excess), 5.0))
    assert any(excess > 0 for excess in excesses)
    assert state(folder)["value"] == multipliers[-1]
    assert len(state(folder)["costs"]) == 12  # the last of 8 a step
    assert all(cost > 0 for cost in told(folder, "cost_critic.loss"))
    critic, cost_critic = weights(folder, "critic"), weights(folder, "cost_critic")
    assert not all(torch.equal(tensor, cost_critic[name]) for name, tensor in critic.items())


async def test_a_step_tells_the_mean_cost_of_its_samples(recipe_of: MakeOf):
    folder = await finished(recipe_of(steps=1, advantage={"cost_limit": 0.25, "cost_window": 8}))
    (cost,), (excess,) = told(folder, "cost_mean"), told(folder, "cost_excess")
    assert cost - 0.25 == pytest.approx(excess)


async def test_a_multiplier_of_zero_is_ppo_bit_for_bit(recipe_of: MakeOf, table: dict[str, Any]):
    safe = await finished(recipe_of(advantage={"multiplier": 0.0, "kl_coefficient": 0.1}))
    plain = await finished(to_recipe(table | {"steps": STEPS, "advantage": {"kl_coefficient": 0.1}}))
    assert told(safe, "multiplier") == [0.0] * STEPS
    for role in ("policy", "critic"):
        assert_same(weights(safe, role), weights(plain, role))


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
    assert told(resumed.folder, "multiplier") == told(whole, "multiplier")
    assert state(resumed.folder) == state(whole)
    for role in TRAINED:
        assert_same(weights(resumed.folder, role), weights(whole, role))


async def test_a_run_that_was_cut_off_goes_on_from_the_multiplier_of_its_checkpoint(recipe_of: MakeOf, tmp_path: Path):
    """Step 3 was committed and is done again: its costs count once."""
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
    assert state(folder, 2)["value"] == told(whole, "multiplier")[1]
    async with resume(folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    assert told(folder, "multiplier") == told(whole, "multiplier")
    for role in TRAINED:
        assert_same(weights(folder, role), weights(whole, role))
