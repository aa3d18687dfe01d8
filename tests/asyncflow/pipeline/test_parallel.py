"""Policy and critic on collective ranks in Ray actors: the run is that of one process.

The policy trains 1-2-2 and generates 1-1, so every step switches layouts twice; the critic trains 1-1-2.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import asyncflow
from asyncflow.observe.timeline import read_spans
from asyncflow.recipe.config import Recipe, recipe_text
from asyncflow.run.launch import resume
from protocols.control.events import CheckpointWritten, Evaluated, RunEnded, StepCommitted
from tests import tiny
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.test_replacement import process_of
from workers.training.models import canonical_tensors, load_causal

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # a dozen processes that import torch, on two cores

STEPS = 3
VOCABULARY = 48  # of the models, divisible by two ranks; the tokenizer has one token less
ONE_PROCESS = {"runtime": "local", "deterministic": True}
PARALLEL: dict[str, Any] = {
    "runtime": "ray",
    "deterministic": False,
    "pools": {"train": {"devices": 4}, "value": {"devices": 2}, "main": {}},
    "placement": {
        "policy": {"pool": "train", "parallel": "1-2-2", "generation": "1-1"},
        "critic": {"pool": "value", "parallel": "1-1-2"},
        "reference": {"pool": "main"},
        "reward": {"pool": "main"},
    },
}


@pytest.fixture
def recipe_of(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """The small recipe with models whose vocabulary is divisible, and an epsilon that makes Adam behave like SGD.

    Adam turns the rounding of a gradient near zero into a full step.
    """
    policy, other = (
        str(tiny.make_policy(tmp_path / name, seed=seed, vocabulary=VOCABULARY))
        for name, seed in (("policy", 0), ("other", 5))
    )
    reward = str(tiny.make_reward(tmp_path / "reward", seed=1, vocabulary=VOCABULARY))

    def make(**changes: Any) -> Recipe:
        models = {
            "policy": {"path": policy, "learning_rate": 0.1},
            "critic": {"path": policy, "learning_rate": 0.1},
            "reference": {"path": other},
            "reward": {"path": reward},
        }
        settings = {
            "steps": STEPS,
            "models": models,
            "optimizer": {"epsilon": 1.0},
            "loss": {"mini_batches": 2},
            "checkpoints": {"every": 1},
            "deadlines": {"stall": 60.0, "give_up": 120.0},
        }
        return make_recipe(**{**settings, **changes})

    return make


async def run(recipe: Recipe) -> tuple[Path, list[StepCommitted], list[float]]:
    """Run to the end. Returns the folder, the committed steps, and the results of the evaluations."""
    steps, evaluations = [], []
    async with asyncflow.launch(recipe) as launched:
        async for event in launched.events():
            match event:
                case StepCommitted():
                    steps.append(event)
                case Evaluated():
                    evaluations.append(event.value)
        ended = await launched.wait()
    assert ended.outcome == "finished", ended.error
    return launched.folder, steps, evaluations


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's policy, as transformers loads them."""
    model: PreTrainedModel = load_causal(folder / "policy")
    return dict(canonical_tensors(model))


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.usefixtures("ray_started")
async def test_a_run_on_many_ranks_is_that_of_one_process(recipe_of: MakeRecipe) -> None:
    alone, plain, evaluated = await run(recipe_of(**ONE_PROCESS))
    together, steps, evaluated_together = await run(recipe_of(**PARALLEL))
    assert_close(exported(together), exported(alone))
    start = load_file(Path(recipe_of().models["policy"].path) / "model.safetensors")
    moved = max(float((exported(alone)[name] - tensor).abs().max()) for name, tensor in start.items())
    assert moved > 1e-3, "the policy was hardly trained, so the comparison says nothing"
    assert evaluated_together == evaluated
    for ours, theirs in zip(steps, plain, strict=True):
        assert (ours.samples, ours.tokens_generated) == (theirs.samples, theirs.tokens_generated)
        measured = {name: ours.metrics[name] for name in theirs.metrics if name.startswith(("policy.", "critic."))}
        assert measured == pytest.approx({name: theirs.metrics[name] for name in measured}, rel=1e-3, abs=1e-5)
    _assert_switches_are_measured(together, steps)


def _assert_switches_are_measured(folder: Path, steps: list[StepCommitted]) -> None:
    whole = sum(tensor.nbytes for tensor in exported(folder).values())
    spans = [span for span in read_spans(folder / "timeline.json") if span.service == "policy"]
    to_generation = [span for span in spans if span.activity == "to_generation"]
    to_training = [span for span in spans if span.activity == "to_training"]
    generated = [span for span in spans if ".generate" in span.activity]
    assert len(to_generation) == len(generated) == len(to_training) >= STEPS
    for first, middle, last in zip(to_generation, generated, to_training, strict=True):
        assert first.start <= first.end <= middle.start <= middle.end <= last.start
    for step in steps:
        measured = {name: value for name, value in step.metrics.items() if name.startswith("policy.transition.")}
        # Each of two tensor ranks has half of the matrices and all norms, so it receives slightly less than half.
        assert 0.45 * whole < measured["policy.transition.received_bytes"] < 0.5 * whole
        assert measured["policy.transition.generation_bytes"] == whole
        assert measured["policy.transition.redundant_bytes"] == 0
        assert measured["policy.transition.seconds"] > 0


@pytest.mark.usefixtures("ray_started")
async def test_a_rank_that_is_killed_ends_the_run_and_another_topology_goes_on_from_its_checkpoint(
    recipe_of: MakeRecipe,
) -> None:
    alone, _, _ = await run(recipe_of(steps=STEPS + 2, **ONE_PROCESS))
    once = {"failures": {"restarts": 0}}  # else the run would roll back and go on
    async with asyncflow.launch(recipe_of(steps=STEPS + 2, **PARALLEL, **once)) as killed:
        async for event in killed.events():
            if isinstance(event, CheckpointWritten) and event.step == 2:
                os.kill(process_of("policy-1", killed.folder), signal.SIGKILL)
        ended: RunEnded = await killed.wait()
    assert ended.outcome == "failed"
    assert "its process is gone" in ended.error
    placement = {
        **PARALLEL["placement"],
        "policy": {"pool": "train", "parallel": "2-1-1"},
        "critic": {"pool": "value"},  # one process, which reads the checkpoint of two ranks
    }
    other = recipe_of(steps=STEPS + 2, **{**PARALLEL, "placement": placement})
    (killed.folder / "recipe.toml").write_text(recipe_text(other))
    async with resume(killed.folder) as resumed:
        ended = await resumed.wait()
    assert (ended.outcome, ended.step) == ("finished", STEPS + 2), ended.error
    assert_close(exported(killed.folder), exported(alone))
