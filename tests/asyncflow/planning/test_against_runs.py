"""The simulator against real runs: same rules, so the same steps, where injected delays make up most of the time.

A real run also computes and hands rows on, so it is a little slower than its simulation, and never faster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncflow.launching import launch
from asyncflow.placement.devices import CATALOGUE, Reach
from asyncflow.placement.workload import Lengths
from asyncflow.planning.calibration import Calibration
from asyncflow.planning.scenarios import of_recipe, prompt_lengths
from asyncflow.planning.simulator import Simulated, simulate
from asyncflow.validate import check
from tests.asyncflow.conftest import MakeRecipe

TOKENS, STEPS = 3, 7
INSTANT = msgspec.structs.replace(
    CATALOGUE["cpu-slot"], peak_flops=1e18, memory_bytes_per_s=1e18, network_bytes_per_s=1e18,
    reach=Reach(host_step_s=0, host_sequence_s=0),
)  # fmt: skip
DELAYS = {
    "policy": {"generate": 0.3, "update": 0.25},
    "critic": {"values": 0.1, "update": 0.2},
    "reference": {"log_probs": 0.1},
    "reward": {"score": 0.1},
    "generator": {"generate": 0.3},
}
PLACEMENTS: dict[str, tuple[int, dict[str, str]]] = {
    "colocated": (0, {"policy": "a", "critic": "a", "reference": "a", "reward": "a"}),
    "split": (0, {"policy": "a", "reference": "a", "critic": "b", "reward": "b"}),
    "apart, one version ahead": (
        1, {"policy": "a", "critic": "b", "reference": "b", "reward": "c", "generator": "d"},
    ),
}  # fmt: skip


async def both(make_recipe: MakeRecipe, staleness: int, pools: dict[str, str]) -> tuple[Simulated, list[float]]:
    """What is predicted, and the seconds of the real steps."""
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
async def test_a_run_takes_the_steps_that_were_predicted(make_recipe: MakeRecipe, name: str):
    predicted, measured = await both(make_recipe, *PLACEMENTS[name])
    expected = sum(predicted.steps_s[2:])  # the first wait for models to warm up
    assert expected <= sum(measured[2:]) * 1.02 and sum(measured[2:]) <= 1.6 * expected
