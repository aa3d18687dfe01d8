"""The policy's own ranks generate with vLLM; each switch of layouts transfers the weights trained last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import asyncflow
from asyncflow.observe.timeline import Span, read_spans
from asyncflow.recipe.config import Recipe
from protocols.control.events import Evaluated, StepCommitted
from protocols.layout.topology import Topology
from tests import tiny
from tests.asyncflow.conftest import MakeRecipe
from workers.parallel.model import ParallelModel
from workers.parallel.plan import ShardPlan
from workers.training.models import load_causal

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STEPS = 2
VOCABULARY = 48  # divisible by two ranks; the tokenizer has one token less
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "deterministic": False,
    "generation": {"engine": "vllm", "kv_cache_bytes": 16 * 1024 * 1024},
    "optimizer": {"epsilon": 1.0},  # makes Adam behave like SGD
    "deadlines": {"stall": 120.0, "give_up": 240.0},
}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Models with a vocabulary that is divisible by two ranks."""
    return {
        "policy": str(tiny.make_policy(tmp_path / "policy", vocabulary=VOCABULARY)),
        "reference": str(tiny.make_policy(tmp_path / "other", seed=5, vocabulary=VOCABULARY)),
        "reward": str(tiny.make_reward(tmp_path / "reward", seed=1, vocabulary=VOCABULARY)),
    }


def recipe_of(make_recipe: MakeRecipe, folders: dict[str, str], **changes: Any) -> Recipe:
    models = {
        "policy": {"path": folders["policy"], "learning_rate": 0.3},
        "critic": {"path": folders["policy"], "learning_rate": 0.1},
        "reference": {"path": folders["reference"]},
        "reward": {"path": folders["reward"]},
    }
    return make_recipe(**SETTINGS, models=models, **changes)


async def run(recipe: Recipe) -> tuple[Path, list[StepCommitted], int]:
    """Run to the end. Returns the folder, the committed steps, and the number of evaluations."""
    async with asyncflow.launch(recipe) as launched:
        events = [event async for event in launched.events()]
        ended = await launched.wait()
    assert ended.outcome == "finished", ended.error
    steps = [event for event in events if isinstance(event, StepCommitted)]
    return launched.folder, steps, sum(isinstance(event, Evaluated) for event in events)


def assert_followed(recipe: Recipe, folder: Path, steps: list[StepCommitted]) -> None:
    """Every row was generated with the weights that its step then trained, and the weights do change."""
    start = load_file(Path(recipe.models["policy"].path) / "model.safetensors")
    end = load_file(folder / "policy" / "model.safetensors")
    assert max(float((end[name] - start[name]).abs().max()) for name in start) > 1e-2, "the policy was hardly trained"
    assert [step.samples for step in steps] == [recipe.samples_per_step] * STEPS
    assert all(step.metrics["policy.log_ratio_max"] < 1e-3 for step in steps)


def transition(step: StepCommitted) -> dict[str, float]:
    prefix = "policy.transition."
    return {name.removeprefix(prefix): value for name, value in step.metrics.items() if name.startswith(prefix)}


def switches(folder: Path) -> list[Span]:
    return [span for span in read_spans(folder / "timeline.json") if span.activity == "to_generation"]


async def test_one_rank_transfers_its_weights_in_its_own_process(make_recipe: MakeRecipe, folders: dict[str, str]):
    recipe = recipe_of(make_recipe, folders)
    folder, steps, evaluated = await run(recipe)
    assert_followed(recipe, folder, steps)
    assert evaluated
    whole = sum(p.nbytes for p in load_causal(folders["policy"]).parameters())
    for step in steps:
        assert (transition(step)["received_bytes"], transition(step)["copied_bytes"]) == (0, whole)
        assert transition(step)["seconds"] > 0
    assert len(switches(folder)) >= STEPS


@pytest.mark.ray
@pytest.mark.usefixtures("ray_started")
async def test_two_ranks_feed_one_engine_of_two_workers(make_recipe: MakeRecipe, folders: dict[str, str]):
    placement = {
        "policy": {"pool": "train", "parallel": "1-2-1", "generation": "1-2"},
        **{role: {"pool": "main"} for role in ("critic", "reference", "reward")},
    }
    pools = {"train": {"devices": 2}, "main": {}}
    recipe = recipe_of(make_recipe, folders, runtime="ray", pools=pools, placement=placement)
    folder, steps, _ = await run(recipe)
    assert_followed(recipe, folder, steps)
    plan = ParallelModel(folders["policy"], Topology()).decoder_plan
    half = ShardPlan(plan.decoder, 1, 2)
    shard_bytes = 4 * sum(half.shard_elements(spec) for spec in half.parameters(0))
    for step in steps:
        assert transition(step)["received_bytes"] == 0  # a worker generates with the shard that its rank trains
        assert transition(step)["copied_bytes"] == shard_bytes
        assert transition(step)["peak_bytes"] >= shard_bytes
    assert len(switches(folder)) >= STEPS
