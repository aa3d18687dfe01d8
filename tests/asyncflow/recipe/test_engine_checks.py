"""An engine that can't run the policy, or hold its rows, is refused before it starts, in the recipe's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe import engine_checks
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput
from tests import families
from tests.asyncflow.conftest import MakeRecipe

VLLM = {"runtime": "ray", "deterministic": False, "pools": {"main": {}, "one": {}}}
GENERATOR = {"generator": {"pool": "one"}}
WITH_A_PLAN = ("llama3", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    return {family: families.make(family, root / family) for family in families.CONFIGS}


@pytest.fixture
def made(make_recipe: MakeRecipe, folders: dict[str, Path]) -> Any:
    """A recipe with a family's models, an engine, a placement and other changes."""

    def make(family: str, engine: str = "vllm", placement: dict[str, Any] = GENERATOR, **changes: Any) -> Any:
        critic = {"path": str(folders[family]), "learning_rate": 1e-3}
        policy = critic | {"lora": changes.pop("lora", {})}
        models = {"policy": policy, "reference": {"path": str(folders[family])}, "reward": {"rule": "exact_match"}}
        generation = {"engine": engine, "max_tokens": 6, **changes.pop("generation", {})}
        models |= {"critic": critic}
        recipe = make_recipe(models=models, placement=placement, generation=generation, **(VLLM | changes))
        return check(recipe).recipe

    return make


def refused(made: Any, *arguments: Any, **changes: Any) -> str:
    with pytest.raises(BadInput) as caught:
        made(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which family runs in which engine


@pytest.mark.parametrize("family", families.CONFIGS)
def test_every_family_generates_in_a_service_of_its_own(made, family: str):
    for engine in ["torch"] if family == "gpt_neox" else ["torch", "vllm"]:
        assert made(family, engine).generation.engine == engine


@pytest.mark.parametrize("family", families.CONFIGS)
def test_on_one_rank_every_family_generates_with_torch_beside_its_training(made, family: str):
    made(family, "torch", {})


@pytest.mark.parametrize("family", families.CONFIGS)
def test_beside_its_training_vllm_generates_for_families_with_a_plan(made, family: str):
    if family in WITH_A_PLAN:
        made(family, "vllm", {})
    else:
        message = refused(made, family, "vllm", {})
        assert message.startswith("placement.policy.parallel = '1-1-1': ")
        assert message.endswith("; want a [placement] of generator or generation.engine = 'torch'")


MANY = {"pools": {"main": {"devices": 2}, "one": {}}}
FULLY_SHARDED = {"pool": "main", "parallel": "1-1-2", "backend": "fsdp"}
ROLES = ("policy", "critic", "reference")


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("lora", [{}, {"rank": 2}], ids=["whole", "lora"])
def test_every_family_is_fully_sharded_in_every_role(made, family: str, lora: dict[str, int]):
    made(family, "torch", GENERATOR | dict.fromkeys(ROLES, FULLY_SHARDED), lora=lora, **MANY)


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("role", ROLES)
def test_in_3d_run_the_families_with_a_plan(made, family: str, role: str):
    placement = GENERATOR | {role: {"pool": "main", "parallel": "2-1-1"}}
    if family in WITH_A_PLAN:
        made(family, "torch", placement, **MANY)
        if role == "policy":
            message = refused(made, family, "torch", placement, lora={"rank": 2}, **MANY)
            assert message.startswith("models.policy.lora: adapters train on ranks that hold the whole model")
    else:
        message = refused(made, family, "torch", placement, **MANY)
        assert message.startswith(f"placement.{role}.parallel = '2-1-1': ")
        assert message.endswith("; want parallel = '1-1-d' with backend = 'fsdp', which takes any family")


def test_adapters_of_layers_that_the_policy_does_not_have_are_refused(made):
    made("qwen3_moe", "torch", lora={"rank": 2, "targets": ["gate_up_proj", "o_proj"]})
    message = refused(made, "qwen3_moe", "torch", lora={"rank": 2, "targets": ["c_attn"]})
    assert message.startswith("models.policy.lora.targets: ")
    assert message.endswith(
        "has no linear layer 'c_attn'; it has down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj"
    )


def test_a_family_that_vllm_runs_by_transformers_code_is_refused(made):
    """It would change that code for its whole process, and its layers don't take the weights of a publication."""
    message = refused(made, "gpt_neox")
    assert message.endswith("new weights while it runs; want generation.engine = 'torch'")


def test_a_family_that_vllm_does_not_have_is_named(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_checks, "vllm_support", lambda config: "none")
    message = refused(made, "opt")
    assert message == "generation.engine = 'vllm': it has no model_type 'opt'; want generation.engine = 'torch'"


def test_a_head_that_vllm_has_no_kernel_for_is_named(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_checks, "CPU_HEAD_SIZES", (64, 128))
    message = refused(made, "llama3")
    assert "on a CPU it has attention heads of 64, 128, the policy's are 32 wide" in message
    monkeypatch.setattr(engine_checks, "vllm_is_for_cpu", lambda: False)
    made("llama3")


# --- the context and the cache


def test_the_engines_context_is_what_the_rows_need(made):
    """Prompts of 4 tokens and 6 more; a whole number of blocks that the probe fits."""
    assert made("llama3").generation.max_model_tokens == 96
    assert made("llama3", generation={"max_tokens": 100}).generation.max_model_tokens == 128
    assert made("opt", generation={"max_tokens": 121}).generation.max_model_tokens == 126  # the model's own


def test_a_context_that_the_recipe_gives_stays(made):
    assert made("llama3", generation={"max_model_tokens": 10}).generation.max_model_tokens == 10


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_tokens": 253}, "a context of 256 tokens has room for prompts of 3 beside generation.max_tokens = 253; "),
        ({"max_tokens": 253}, "generation.max_tokens = 252 or less"),
        ({"max_model_tokens": 9}, "generation.max_model_tokens = 10"),
        ({"max_model_tokens": 512}, "= 512: the policy's context is 256; want no more than that, or 0"),
        ({"kv_cache_bytes": 10_000}, "tokens takes 65536 bytes (2 layers, 1 key-value heads of 32); want that or more"),
    ],
)
def test_a_context_or_a_cache_that_is_too_small_is_computed(made, generation: dict[str, int], message: str):
    assert message in refused(made, "llama3", generation=generation)


def test_torch_has_no_cache_to_size(made):
    made("llama3", "torch", generation={"kv_cache_bytes": 1})
