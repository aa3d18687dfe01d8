"""Contexts and cache sizes follow from config.json, whatever a family calls them."""

from __future__ import annotations

import pytest

from tests import families
from workers.data.model_config import attention_sizes, cache_bytes, cache_bytes_per_row, context_in, probe_tokens

LONG = {"type": "longrope", "long_factor": [4.0], "short_factor": [1.0]}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_sizes_of_each_family_are_its_configs(family: str):
    config = families.config(family)
    sizes = attention_sizes(config.to_dict())
    assert sizes is not None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert sizes[:4] == (config.num_hidden_layers, config.num_attention_heads, heads, 32)
    assert context_in(config.to_dict()) == (128 if family == "phi3" else config.max_position_embeddings)


def test_a_row_takes_whole_blocks_of_keys_and_values():
    """SmolLM2-135M: 30 layers, 3 key-value heads of 64; 46,080 bytes a token in float32."""
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    sizes = attention_sizes(config)
    assert sizes is not None
    assert cache_bytes_per_row(sizes, 33, "float32") == 64 * 30 * 2 * 3 * 64 * 4
    assert cache_bytes_per_row(sizes, 33, "bfloat16") == 64 * 30 * 2 * 3 * 64 * 2
    assert cache_bytes_per_row(sizes, 33, "float32", tensor_shards=3) == 64 * 30 * 2 * 64 * 4
    assert cache_bytes(sizes, 10, 64, "float32") == (10 * 64 + 32) * 46_080


def test_layers_of_several_kinds_are_counted_as_vllm_pools_them():
    kinds = ["sliding_attention"] * 5 + ["full_attention"] * 2
    config = {"num_hidden_layers": 7, "num_attention_heads": 1, "hidden_size": 64, "layer_types": kinds}
    sizes = attention_sizes(config)
    assert sizes is not None
    assert sizes.pooled_layers == 8


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": LONG}, 4096),
        ({"model_type": "bloom", "seq_length": 2048}, None),
        ({}, None),
    ],
)
def test_the_context_has_many_names(config: dict[str, object], context: int | None):
    assert context_in(config) == context


def test_a_probe_fits_a_small_context():
    assert [probe_tokens(context) for context in (1024, 65, 64, 16)] == [64, 64, 63, 15]
