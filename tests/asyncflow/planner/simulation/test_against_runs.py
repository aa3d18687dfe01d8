"""The simulator against real runs: step times are equal if injected delays dominate them.

A real run also computes and transfers rows, so it is slower than its simulation, the more so on a busy machine, and
never faster. The simulation's own lower bound is computed by hand.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncflow.planner.calibration.calibration import Calibration
from asyncflow.planner.costs.devices import CATALOGUE, Efficiency
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.scenarios import of_recipe, prompt_lengths
from asyncflow.planner.simulation.simulator import SimulatedRun, simulate
from asyncflow.recipe.checks import check
from asyncflow.run.launch import launch
from tests.asyncflow.conftest import MakeRecipe

TOKENS, STEPS = 3, 7
INSTANT = msgspec.structs.replace(
    CATALOGUE["cpu-slot"], peak_flops=1e18, memory_bytes_per_s=1e18, network_bytes_per_s=1e18,
    efficiency=Efficiency(host_step_s=0, host_sequence_s=0),
)  # fmt: skip
DELAYS = {
    "policy": {"generate": 0.3, "update": 0.25},
    "critic": {"values": 0.1, "update": 0.2},
    "reference": {"log_probs": 0.1},
    "reward": {"score": 0.1},
    "generator": {"generate": 0.3},
}
PLACEMENTS: dict[str, tuple[int, dict[str, str], float]] = {  # staleness, service -> pool, seconds of a step
    "colocated": (0, {"policy": "a", "critic": "a", "reference": "a", "reward": "a"}, 0.3 + 3 * 0.1 + 0.25 + 0.2),
    "split": (0, {"policy": "a", "reference": "a", "critic": "b", "reward": "b"}, 0.3 + 2 * 0.1 + 0.25),
    "apart, one version ahead": (  # the pool with most to do is never idle
        1, {"policy": "a", "critic": "b", "reference": "b", "reward": "c", "generator": "d"}, 2 * 0.1 + 0.2,
    ),
}  # fmt: skip


async def both(make_recipe: MakeRecipe, staleness: int, pools: dict[str, str]) -> tuple[SimulatedRun, list[float]]:
    """The predicted and the real seconds of the steps."""
    changes: dict[str, Any] = {
        "steps": STEPS,
        "staleness": staleness,
        "deterministic": False,
        "generation": {"max_tokens": TOKENS},
        "pools": {pool: {} for pool in set(pools.values())},
        "placement": {service: {"pool": pool} for service, pool in pools.items()},
        "delays": {service: DELAYS[service] for service in pools},
        "checkpoints": {"every": 0},
    }
    checked = check(make_recipe(**changes))
    calibration = Calibration(INSTANT, Lengths.fixed(TOKENS))
    predicted = simulate(of_recipe(checked.recipe, checked.dataflow, prompt_lengths(checked.train), calibration))
    async with launch(checked.recipe, folder=Path(checked.recipe.folder) / f"{staleness}-{len(pools)}") as run:
        ended = await run.wait()
        assert ended.outcome == "finished", ended
        return predicted, [step.seconds for step in run.metrics]


@pytest.mark.parametrize("name", PLACEMENTS)
async def test_a_run_takes_no_less_than_the_steps_that_were_predicted(make_recipe: MakeRecipe, name: str):
    staleness, pools, step_s = PLACEMENTS[name]
    predicted, measured = await both(make_recipe, staleness, pools)
    steady = predicted.steps_s[2:]  # the first wait for models to warm up
    assert statistics.median(steady) == pytest.approx(step_s, rel=0.02)
    assert sum(measured[2:]) >= 0.98 * sum(steady)
