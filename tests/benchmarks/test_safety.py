"""The benchmark of Safe-RLHF: what it reports, and that it trains and scores both algorithms."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.bench.safety import RECIPES, SafetyResult, measure, measured

RECIPES_HERE = Path(__file__).parents[2] / RECIPES
PPO = [SafetyResult("ppo", seed, 0.0, cost, 0.9, 0.8) for seed, cost in enumerate((10.0, 12.0))]
SAFE = SafetyResult("safe_rlhf", 0, 0.0, -3.0, 0.01, 0.6, [1.0, 1.5, 0.5])


def test_costs_stand_beside_their_limit_and_the_multiplier_with_its_course():
    assert measured([PPO[0], SAFE, PPO[1]]).lines == [
        "| algorithm | seeds | reward | held-out cost | its limit | unsafe answers | multiplier: first, most, last |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ppo | 2 | 0.800 ± 0.000 | 11.000 ± 1.414 | 0 | 90.0% | - |",
        "| safe_rlhf | 1 | 0.600 ± 0.000 | -3.000 ± 0.000 | 0 | 1.0% | 1.00, 1.50, 0.50 |",
    ]
    cost, unsafe, _ = measured([SAFE]).rows
    assert (cost.value, cost.bound, unsafe.value) == (-3.0, 0.0, 0.01)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """The recipes, whose policy and cost model have hardly been trained."""
    folder = tmp_path / "safety"
    folder.mkdir()
    for path in RECIPES_HERE.glob("*.toml"):
        text = path.read_text().replace("runs/demo", str(tmp_path))
        for steps in (500, 150):
            text = text.replace(f"\nsteps = {steps}\n", "\nsteps = 2\n")
        (folder / path.name).write_text(text)
    return folder


async def test_both_are_trained_and_scored_by_the_same_cost_model(recipes: Path, tmp_path: Path):
    ppo, safe = await measure(1, folder=tmp_path / "runs", recipes=recipes, overrides=["steps=2"])
    assert (ppo.algorithm, ppo.multipliers, safe.algorithm, len(safe.multipliers)) == ("ppo", [], "safe_rlhf", 2)
    assert ppo.cost != 0.0 != safe.cost
