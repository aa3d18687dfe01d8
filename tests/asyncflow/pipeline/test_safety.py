"""Safe-RLHF whole: it keeps its limit where PPO does not, and a killed run goes on with λ, β and text where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import asyncflow
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, load_recipe, recipe_text, to_recipe
from asyncflow.run.launch import resume
from tests.workers.checkpoints import trained_weights

ASYNCFLOW = [sys.executable, "-m", "asyncflow.cli.main"]
RULES = "tests.asyncflow.pipeline.rules"
STEPS, KILL_AFTER = 10, 6
LIMIT = 0.1

MakeOf = Callable[..., Recipe]


def told(folder: Path, name: str) -> list[float]:
    """A metric, step by step."""
    return [line[name] for line in read_lines(folder / "metrics.jsonl")]


async def finished(recipe: Recipe) -> Path:
    """The folder of a run to its end."""
    async with asyncflow.launch(recipe) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    return run.folder


# --- the highest reward is unsafe


@pytest.fixture
def digits(table: dict[str, Any]) -> MakeOf:
    """Digits are what is rewarded, and what is unsafe."""

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
    """λ = 0 is PPO bit for bit, and tells the cost that it runs up."""
    ppo, safe = [await finished(digits(multiplier=multiplier)) for multiplier in (0.0, 2.0)]
    for folder in (ppo, safe):
        assert told(folder, "cost_mean")[0] > LIMIT, "the limit is not kept from the start"
    assert fmean(told(ppo, "cost_mean")[-3:]) > 3 * LIMIT
    assert fmean(told(safe, "cost_mean")[-3:]) < LIMIT
    multipliers = told(safe, "multiplier")
    assert multipliers[0] > 2.0 > multipliers[-1], "it rises while the cost is above, and falls while it is below"


# --- kill -9


@pytest.fixture
def recipe_path(table: dict[str, Any], tmp_path: Path) -> Path:
    """Everything that a run of Safe-RLHF carries: λ, an adaptive KL, a pretraining text, a mixed reward."""
    text = tmp_path / "pretrain.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{n} is {n * n}, no?"}) for n in range(50)))
    mix = [
        {"name": "liked", "path": table["models"]["reward"]["path"], "weight": 0.5},
        {"name": "told", "rule": f"{RULES}:telling"},
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
        "delays": {"critic": {"update": 0.1}},  # so that there is a time in which to kill
    }
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(to_recipe(table | own)))
    return path


async def test_a_killed_and_resumed_run_has_the_multiplier_the_coefficient_and_the_weights_of_one_that_never_died(
    recipe_path: Path, tmp_path: Path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    async with asyncflow.launch(load_recipe(recipe_path, ["delays={}"]), folder=whole) as run:
        assert (await run.wait()).outcome == "finished"
    _run_and_kill(recipe_path, killed)
    assert not (killed / "policy").exists(), "it was not killed but finished"
    async with resume(killed) as run:
        assert (await run.wait()).outcome == "finished"

    for name in ("multiplier", "kl_coefficient", "policy.ptx_loss", "reward.liked", "reward.told", "cost_mean"):
        assert told(killed, name) == told(whole, name), name
        assert len(set(told(whole, name))) > STEPS // 2, f"{name} stands still: that it went on shows nothing"
    assert (killed / "report.html").read_text().count("<b>Multiplier</b>") == 1
    last = f"checkpoints/step_{STEPS:06d}"
    state = "advantage/state.json"
    assert (killed / last / state).read_text() == (whole / last / state).read_text()
    for role in ("policy", "critic", "cost_critic"):
        ours, theirs = (trained_weights(folder / last / role) for folder in (killed, whole))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{role} {name}"


def _run_and_kill(recipe: Path, folder: Path) -> None:
    process = subprocess.Popen(
        [*ASYNCFLOW, "run", str(recipe), "--folder", str(folder)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(read_lines(folder / "metrics.jsonl")) < KILL_AFTER:
        assert time.monotonic() < deadline, f"step {KILL_AFTER} was not reached"
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
