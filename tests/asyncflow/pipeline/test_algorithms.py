"""Every algorithm end to end: it trains, each sample ends exactly once, and critic-free ones run without a critic."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import asyncflow
from asyncflow.control.store.ledger import Ledger
from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import Flow, trace
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import StepCommitted
from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.roles import GREEDY
from protocols.stage import Measured
from tests.asyncflow.pipeline import plain_critic_free
from tests.asyncflow.pipeline.runs import differing, finished, weights
from workers.advantages.experience import experience_of, on_tokens
from workers.advantages.remax import remax as advantages
from workers.settings import Loss, Model

STEPS, PROMPTS, SAMPLES = 2, 4, 2
RULES = "tests.asyncflow.pipeline.rules"
BESIDE_THE_POLICY = {"ppo": {"critic"}, "safe_rlhf": {"critic", "cost_critic", "advantage"}}  # in a checkpoint

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """The recipe of an algorithm: only the models that it calls, and its own defaults of [loss] and [advantage]."""

    def make(algorithm: str, **changes: Any) -> Recipe:
        called = trace(algorithm_named(algorithm)).services
        costs = {"cost": {"rule": f"{RULES}:varied"}, "cost_critic": table["models"]["critic"]}
        models = {role: model for role, model in (table["models"] | costs).items() if role in called}
        sizes = {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
        return to_recipe(table | {"algorithm": algorithm, "models": models, "advantage": {}} | sizes | changes)

    return make


@pytest.mark.parametrize("name", ALGORITHMS)
async def test_it_trains_the_policy_and_every_sample_ends_once(recipe_of: MakeOf, name: str):
    recipe = recipe_of(name)
    folder = await finished(recipe)
    start = load_file(Path(recipe.models["policy"].path) / "model.safetensors")
    assert len(differing(start, weights(folder, STEPS))) > len(start) / 2
    ledger = Ledger(folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.created, totals.trained, totals.live) == (16, 16, 0)  # greedy baselines are not among them
    assert {path.name for path in (folder / "checkpoints" / "step_000002").iterdir() if path.is_dir()} == (
        {"policy"} | BESIDE_THE_POLICY.get(name, set())
    )


@pytest.mark.parametrize("name", ["grpo", "remax"])
async def test_it_is_the_plain_loop_bit_for_bit(recipe_of: MakeOf, name: str):
    recipe = recipe_of(name, **({"advantage": {"kl_coefficient": 0.1}} if name == "remax" else {}))
    folder = await finished(recipe)
    assert differing(weights(folder, STEPS), getattr(plain_critic_free, name)(recipe)) == []


async def test_a_separate_generator_generates_the_greedy_baselines_too(recipe_of: MakeOf):
    """It runs asynchronously, so a prompt's baseline and samples arrive in any order and with different versions."""
    pools = {name: {"devices": 1} for name in ("train", "rollout")}
    placement = {"policy": {"pool": "train"}, "generator": {"pool": "rollout"}}
    recipe = recipe_of("remax", steps=3, staleness=1, deterministic=False, pools=pools, placement=placement)
    async with asyncflow.launch(recipe) as run:
        committed = [event async for event in run.events() if isinstance(event, StepCommitted)]
        assert (await run.wait()).outcome == "finished"
    assert [event.samples for event in committed] == [PROMPTS * SAMPLES] * 3
    assert all(event.metrics["baseline_mean"] != 0.0 for event in committed)
    assert max(event.staleness_max for event in committed) <= 1


async def test_without_a_critic_a_stopped_run_resumes_to_the_same_weights(recipe_of: MakeOf):
    recipe = recipe_of("remax", steps=5)
    whole = await finished(recipe)
    async with asyncflow.launch(recipe) as stopped:
        async for event in stopped.events():
            if isinstance(event, StepCommitted):
                break
        ended = await stopped.stop()
    assert ended.outcome == "stopped"
    assert 1 <= ended.step < 5
    async with resume(stopped.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    assert differing(weights(resumed.folder, 5), weights(whole, 5)) == []


# --- identities of whole runs, bit for bit


def plain_scores(rollouts: Rollouts, scores: Scores) -> Experience:
    """REINFORCE: every token's advantage is the response's score."""
    return experience_of(rollouts, on_tokens(scores.scores.astype(np.float64), rollouts.loss_mask))


def without_baseline(rollouts: Rollouts, reference: LogProbs, scores: Scores, greedy: Scores) -> Measured[Experience]:
    """ReMax with b = 0 and beta = 0."""
    nothing = msgspec.structs.replace(greedy, scores=np.zeros_like(greedy.scores))
    return advantages(rollouts, reference, scores, nothing, kl_coefficient=0.0)


@asyncflow.algorithm(loss=Loss(policy="reinforce"))
def reinforce(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    flow.policy.update(flow.join(rollouts, flow.reward.score(rollouts)).apply(plain_scores))


@asyncflow.algorithm
def bare_remax(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    greedy = flow.reward.score(flow.policy.generate(flow.prompts, sampling=GREEDY))
    joined = flow.join(
        rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts), greedy, on="prompt"
    ).apply(without_baseline)
    flow.policy.update(joined)


async def test_remax_without_baseline_and_penalty_is_reinforce(recipe_of: MakeOf):
    """On policy, PPO's loss has REINFORCE's gradient, and greedy rows do not change other rows."""
    ours, theirs = [await finished(recipe_of(f"{__name__}:{name}")) for name in ("bare_remax", "reinforce")]
    assert differing(weights(ours, STEPS), weights(theirs, STEPS)) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grpo", {"loss": {"kl_coefficient": 0.0}}),
        ("dr_grpo", {}),
        ("rloo", {"advantage": {"kl_coefficient": 0.0}}),
        ("gspo", {}),
    ],
)
async def test_groups_of_equal_scores_leave_the_policy_as_it_was(
    recipe_of: MakeOf, models: Path, tmp_path: Path, name: str, change: dict[str, Any]
):
    recipe = recipe_of(name, **change)
    indifferent = Path(shutil.copytree(models / "reward", tmp_path / "indifferent"))
    tensors = load_file(indifferent / "model.safetensors")
    tensors["score.weight"] *= 0
    save_file(tensors, indifferent / "model.safetensors", {"format": "pt"})
    recipe = msgspec.structs.replace(recipe, models=recipe.models | {"reward": Model(path=str(indifferent))})
    start = load_file(Path(recipe.models["policy"].path) / "model.safetensors")
    assert differing(start, weights(await finished(recipe), STEPS)) == []
