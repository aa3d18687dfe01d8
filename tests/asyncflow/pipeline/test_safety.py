"""Safe-RLHF keeps its cost limit where PPO does not; a killed run resumes λ, β and the pretraining text exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from asyncflow.recipe.config import Recipe, load_recipe, recipe_text, to_recipe
from asyncflow.run.launch import resume
from tests.asyncflow.pipeline.runs import differing, finished, metric, run_and_kill, weights

RULES = "tests.asyncflow.pipeline.rules"
STEPS, KILL_AFTER = 10, 6
LIMIT = 0.1

MakeOf = Callable[..., Recipe]


# --- the highest reward is unsafe


@pytest.fixture
def digits(table: dict[str, Any]) -> MakeOf:
    """A recipe in which digits earn the reward and cost as much."""

    def make(**numbers: float) -> Recipe:
        models = table["models"] | {
            "reward": {"rule": f"{RULES}:digits"},
            "cost": {"rule": f"{RULES}:digits"},
            "cost_critic": table["models"]["critic"],
        }
        sizes = {"steps": 12, "prompts_per_step": 8, "samples_per_prompt": 8, "checkpoints": {"every": 0}}
        data = {"train": table["data"]["train"]}
        changes = {"algorithm": "safe_rlhf", "models": models, "loss": {"mini_batches": 2}, "data": data}
        return to_recipe(
            table | sizes | changes | {"advantage": {"kl_coefficient": 0.0, "cost_limit": LIMIT} | numbers}
        )

    return make


async def test_ppo_violates_the_limit_and_safe_rlhf_ends_below_it(digits: MakeOf):
    """λ = 0 is PPO bit for bit, but reports the cost."""
    ppo, safe = [await finished(digits(multiplier=multiplier)) for multiplier in (0.0, 2.0)]
    for folder in (ppo, safe):
        assert metric(folder, "cost_mean")[0] > LIMIT, "the random policy exceeds the limit"
    assert fmean(metric(ppo, "cost_mean")[-3:]) > 3 * LIMIT
    assert fmean(metric(safe, "cost_mean")[-3:]) < LIMIT
    multipliers = metric(safe, "multiplier")
    assert multipliers[0] > 2.0 > multipliers[-1], "it rises while the cost exceeds the limit, and falls below it"


# --- kill -9


@pytest.fixture
def recipe_path(table: dict[str, Any], tmp_path: Path) -> Path:
    """Safe-RLHF with all state that a run can carry: λ, an adaptive KL, a pretraining text, a mixed reward."""
    text = tmp_path / "pretrain.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{n} is {n * n}, no?"}) for n in range(50)))
    mix = [
        {"name": "liked", "path": table["models"]["reward"]["path"], "weight": 0.5},
        {"name": "varied", "rule": f"{RULES}:varied"},
    ]
    models = table["models"] | {
        "reward": {"mix": mix},
        "cost": {"rule": f"{RULES}:digits"},
        "cost_critic": table["models"]["critic"],
    }
    own = {
        "algorithm": "safe_rlhf",
        "steps": STEPS,
        "models": models,
        "data": {"train": table["data"]["train"], "pretrain": str(text)},
        "advantage": {
            "cost_limit": LIMIT,
            "multiplier_rate": 0.5,
            "kl": "adaptive",
            "kl_target": 0.1,
            "kl_horizon": 100,
        },
        "loss": {"ptx_coefficient": 0.3, "ptx_rows": 4, "mini_batches": 2},
        "checkpoints": {"every": 4},
        "delays": {"critic": {"update": 0.3}},  # so that there is time to kill the run before its end
    }
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(to_recipe(table | own)))
    return path


async def test_a_killed_and_resumed_run_has_the_multiplier_the_coefficient_and_the_weights_of_one_that_never_died(
    recipe_path: Path, tmp_path: Path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    await finished(load_recipe(recipe_path, ["delays={}"]), whole)
    run_and_kill(recipe_path, killed, KILL_AFTER)
    async with resume(killed) as run:
        assert (await run.wait()).outcome == "finished"

    for name in ("multiplier", "kl_coefficient", "policy.ptx_loss", "reward.liked", "reward.varied", "cost_mean"):
        assert metric(killed, name) == metric(whole, name), name
        assert len(set(metric(whole, name))) > STEPS // 2, f"{name} does not change, so this proves nothing"
    assert (killed / "report.html").read_text().count("<b>Multiplier</b>") == 1
    last = f"checkpoints/step_{STEPS:06d}"
    state = "advantage/state.json"
    assert (killed / last / state).read_text() == (whole / last / state).read_text()
    for role in ("policy", "critic", "cost_critic"):
        assert differing(weights(killed, STEPS, role), weights(whole, STEPS, role)) == [], role
