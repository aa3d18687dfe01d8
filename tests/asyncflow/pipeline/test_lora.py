"""A policy with LoRA adapters end to end: it learns, its generator gets the adapters, and it resumes and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import asyncflow
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, recipe_text, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import Published, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.workers.checkpoints import trained_weights
from workers.training.models import load_causal

LORA = {"rank": 8, "alpha": 16.0}
APART = {
    "pools": {"train": {"devices": 1}, "rollout": {"devices": 1}},
    "placement": {"policy": {"pool": "train"}, "generator": {"pool": "rollout"}},
    "deterministic": False,
    "staleness": 1,
}


def recipe(table: dict[str, Any], lora: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe of RLOO on an easy task: to write digits."""
    policy = {"path": table["models"]["policy"]["path"], "learning_rate": 5e-3, "lora": lora}
    rule = "tests.asyncflow.pipeline.rules:digits"
    models = {"policy": policy, "reference": {"path": policy["path"]}, "reward": {"rule": rule}}
    sizes = {"prompts_per_step": 8, "samples_per_prompt": 4}
    data = {"train": table["data"]["train"]}
    return to_recipe(table | sizes | {"algorithm": "rloo", "models": models, "advantage": {}, "data": data} | changes)


@pytest.mark.parametrize("publish", ["merged", "adapters"])
async def test_it_learns_from_a_generator_that_follows(table: dict[str, Any], publish: str):
    made = recipe(table, LORA | {"publish": publish}, steps=12, **APART)
    async with asyncflow.launch(made) as run:
        events = [event async for event in run.events()]
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    rewards = [event.reward_mean for event in events if isinstance(event, StepCommitted)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    published = [event for event in events if isinstance(event, Published)]
    assert [event.version.step for event in published] == list(range(13))
    assert all(receipt.probe_difference < 1e-4 for event in published for receipt in event.receipts)
    whole = sum(p.nbytes for p in load_causal(made.models["policy"].path).state_dict().values())
    assert (published[-1].nbytes < 0.25 * whole) == (publish == "adapters")
    _check_export(made, run.folder)


@pytest.mark.ray
@pytest.mark.timeout(600)  # six processes that import torch, on two cores
async def test_adapters_train_fully_sharded_on_ranks_that_hold_a_sharded_reference_too(table: dict[str, Any]):
    placed = {"pools": {"train": {"devices": 2}, "rollout": {"devices": 1}}, "runtime": "ray"} | {
        "placement": {
            "policy": {"pool": "train", "parallel": "1-1-2", "backend": "fsdp"},
            "reference": {"pool": "train", "parallel": "1-1-2", "backend": "fsdp"},
            "generator": {"pool": "rollout"},
        }
    }
    made = recipe(table, LORA | {"publish": "adapters"}, steps=2, **(APART | placed))
    async with asyncflow.launch(made) as run:
        events = [event async for event in run.events()]
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    published = [event for event in events if isinstance(event, Published)]
    assert [event.version.step for event in published] == [0, 1, 2]
    assert all(receipt.probe_difference < 1e-4 for event in published for receipt in event.receipts)
    _check_export(made, run.folder)


def _check_export(made: Recipe, folder: Path) -> None:
    """The exported policy has all tensors, and differs from its base exactly in the layers with adapters."""
    base, policy = (
        load_file(Path(path) / "model.safetensors") for path in (made.models["policy"].path, folder / "policy")
    )
    assert base.keys() == policy.keys()
    changed = {name for name in base if not torch.equal(base[name], policy[name])}
    assert changed == {name for name in base if "_proj.weight" in name}
    assert (folder / "policy" / "adapters" / "adapter_config.json").exists()


async def test_a_stopped_run_resumes_to_the_same_weights(table: dict[str, Any]):
    async with asyncflow.launch(recipe(table, LORA, steps=3)) as whole:
        assert (await whole.wait()).outcome == "finished"
    async with asyncflow.launch(recipe(table, LORA, steps=2)) as part:
        assert (await part.wait()).outcome == "finished"
    checkpoint = trained_weights(part.folder / "checkpoints" / "step_000002" / "policy")
    assert all(".lora_" in name for name in checkpoint)
    longer = load_recipe(part.folder / "recipe.toml", ["steps=3"])
    (part.folder / "recipe.toml").write_text(recipe_text(longer))
    async with resume(part.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    ours, theirs = (load_file(run.folder / "policy" / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_of_another_role_are_refused(make_recipe: MakeRecipe, table: dict[str, Any]):
    models = table["models"]
    with pytest.raises(BadInput, match=r"models\.critic\.lora: only the policy trains adapters"):
        check(make_recipe(models=models | {"critic": models["critic"] | {"lora": LORA}}))
    with pytest.raises(BadInput, match=r"lora: rank = 0 trains all weights"):
        to_recipe(table | {"models": models | {"policy": models["policy"] | {"lora": {"alpha": 2.0}}}})
    placed = {"policy": {"pool": "main", "parallel": "1-2-1"}}
    with pytest.raises(BadInput, match=r"models\.policy\.lora: adapters train on ranks that hold the whole model"):
        check(recipe(table, LORA, placement=placed, pools={"main": {"devices": 2}}, runtime="ray", deterministic=False))
    with pytest.raises(BadInput, match=r"models\.policy\.lora: a vLLM beside the policy takes whole weights"):
        check(make_recipe(models=models | {"policy": models["policy"] | {"lora": LORA}}, generation={"engine": "vllm"}))
