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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    return {family: families.make(family, root / family) for family in families.CONFIGS}


@pytest.fixture
def made(make_recipe: MakeRecipe, folders: dict[str, Path]) -> Any:
    """A recipe with a family's models, an engine, a placement and other changes."""

    def make(family: str, engine: str = "vllm", placement: dict[str, Any] = GENERATOR, **changes: Any) -> Any:
        policy = {"path": str(folders[family]), "learning_rate": 1e-3}
        models = {"policy": policy, "reference": {"path": str(folders[family])}, "reward": {"rule": "exact_match"}}
        generation = {"engine": engine, "max_tokens": 6, **changes.pop("generation", {})}
        models |= {"critic": policy}
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
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_every_family_generates_in_a_service_of_its_own(made, family: str, engine: str):
    assert made(family, engine).generation.engine == engine


@pytest.mark.parametrize("family", families.CONFIGS)
def test_on_one_rank_every_family_generates_with_torch_beside_its_training(made, family: str):
    made(family, "torch", {})


@pytest.mark.parametrize("family", families.CONFIGS)
def test_beside_its_training_vllm_generates_for_families_with_a_plan(made, family: str):
    if families.CONFIGS[family][0] in ("llama", "mistral", "qwen2", "qwen3") and family != "mistral-window":
        made(family, "vllm", {})
    else:
        message = refused(made, family, "vllm", {})
        assert message.startswith("placement.policy.parallel = '1-1-1': ")
        assert message.endswith("; want a [placement] of generator or generation.engine = 'torch'")


def test_a_family_that_vllm_runs_by_transformers_code_needs_a_process_of_its_own(made):
    message = refused(made, "gpt_neox", runtime="local")
    assert message.endswith("for all services of a process: want runtime = 'ray', or generation.engine = 'torch'")
    assert made("gpt_neox", "torch", runtime="local")


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
