"""Checks that the engine of a recipe runs its policy, and gives it the context that the data need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.model_folders import config_of
from asyncflow.recipe.service_specs import colocates_vllm, layout_of
from workers.data.model_config import BLOCK_TOKENS, PROBE_TOKENS, attention_sizes, cache_bytes, context_in
from workers.families import CPU_HEAD_SIZES, vllm_is_for_cpu, vllm_support


def with_context(recipe: Recipe, *sources: PromptSource | None) -> Recipe:
    """The recipe with `generation.max_model_tokens` that its rows need, where it leaves that out. Raises BadInput.

    Rows that exceed a context are out of the sources already, see `prompt_sources`.
    """
    generation, config = recipe.generation, config_of("policy", recipe.models["policy"].path)
    context, longest = context_in(config), max(source.longest for source in sources if source is not None)
    needed, limit = longest + generation.max_tokens, generation.max_model_tokens
    if limit and context and limit > context:
        raise BadInput(
            f"generation.max_model_tokens = {limit}: the policy's context is {context}; want no more than that, or 0"
        )
    if limit:
        return recipe
    rounded = -(-max(needed, PROBE_TOKENS + 1) // BLOCK_TOKENS) * BLOCK_TOKENS
    chosen = msgspec.structs.replace(generation, max_model_tokens=min(rounded, context or rounded))
    return msgspec.structs.replace(recipe, generation=chosen)


def check_engine(recipe: Recipe) -> None:
    """Check that the engine runs the policy's family, and that its cache holds a row. Raises BadInput.

    `generation.max_model_tokens` is set, see `with_context`.
    """
    config = config_of("policy", recipe.models["policy"].path)
    if recipe.generation.engine == "vllm":
        _check_vllm(recipe, config)
        _check_cache(recipe, config)


def _check_vllm(recipe: Recipe, config: Mapping[str, Any]) -> None:
    kind, support = config.get("model_type"), vllm_support(config)
    if support == "none":
        raise BadInput(f"generation.engine = 'vllm': it has no model_type {kind!r}; want generation.engine = 'torch'")
    if support == "transformers":
        raise BadInput(
            f"generation.engine = 'vllm': it runs model_type {kind!r} by transformers' own code, which does not take "
            "new weights while it runs; want generation.engine = 'torch'"
        )
    sizes = attention_sizes(config)
    if sizes and not sizes.latent and vllm_is_for_cpu() and sizes.head_size not in CPU_HEAD_SIZES:
        raise BadInput(
            f"generation.engine = 'vllm': on a CPU it has attention heads of {', '.join(map(str, CPU_HEAD_SIZES))}, "
            f"the policy's are {sizes.head_size} wide; want generation.engine = 'torch'"
        )


def _check_cache(recipe: Recipe, config: Mapping[str, Any]) -> None:
    generation, sizes = recipe.generation, attention_sizes(config)
    if not generation.kv_cache_bytes or sizes is None:
        return
    shards = layout_of(recipe, "policy").tp if colocates_vllm(recipe) else 1
    needed = cache_bytes(sizes, 1, generation.max_model_tokens, recipe.models["policy"].dtype, shards)
    if generation.kv_cache_bytes < needed:
        raise BadInput(
            f"generation.kv_cache_bytes = {generation.kv_cache_bytes}: one row of generation.max_model_tokens = "
            f"{generation.max_model_tokens} tokens takes {needed} bytes ({sizes.layers} layers, {sizes.kv_heads} "
            f"key-value heads of {sizes.head_size}); want that or more, or 0 for what the rows need"
        )
