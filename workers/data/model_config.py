"""Facts about a decoder from its config.json, without torch: its context, its heads, and the size of its KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Of a KV cache on a CPU: the least that vLLM's attention is fast for there; its default of 128 holds four times fewer
# short rows. On GPUs it takes 16, of which this is a multiple.
BLOCK_TOKENS = 32

UNBOUNDED_CONTEXT = 1 << 20  # tokens, of an engine for a family without a bound where the settings give none
PROBE_TOKENS = 64  # of each row that proves a publication: longer than three KV blocks of 16, where a stale cache shows

# What families call the same number.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_UNBOUNDED = ("bloom", "mpt", "mamba", "mamba2", "rwkv")  # no learned or rotary positions: any length


class AttentionSizes(NamedTuple):
    """What a KV cache depends on."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    pooled_layers: int  # layers, filled up where several kinds of them share one pool of blocks
    latent: int = 0  # entries per token and layer of a cache of latents (DeepSeek's); 0: keys and values


def context_in(config: Mapping[str, Any]) -> int | None:
    """The most tokens of prompt and response; None for a family that has no bound.

    Of LongRoPE (Phi-3) the original context: a longer row changes the rotary factors of all rows of its forward pass in
    transformers, and of every row in vLLM, so its log-probs would depend on the rows beside it.
    """
    if config.get("model_type") in _UNBOUNDED:
        return None
    limit = _first(config, _CONTEXT)
    rope: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, original = rope.get("rope_type", rope.get("type")), rope.get("original_max_position_embeddings")
    if kind in ("longrope", "su"):
        return original or config.get("original_max_position_embeddings") or limit
    if limit and kind in ("yarn", "linear") and original is None:
        return int(limit * max(1.0, float(rope.get("factor") or 1.0)))
    return limit


def probe_tokens(context: int) -> int:
    """Tokens of a probe's row in an engine of this context, which answers one token more than it is given."""
    return max(min(PROBE_TOKENS, context - 1), 2)


def attention_sizes(config: Mapping[str, Any]) -> AttentionSizes | None:
    """None for a config that does not name them."""
    layers, heads, hidden = (_first(config, names) for names in (_LAYERS, _HEADS, _HIDDEN))
    if not layers or not heads or not hidden:
        return None
    kv_heads = _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    kinds = Counter(config.get("layer_types") or ())
    if len(kinds) > 1:  # vLLM gives each group of layers as many blocks as the smallest kind has layers
        group = min(kinds.values())
        pooled = sum(-(-count // group) * group for count in kinds.values())
    else:
        pooled = layers
    latent = int(config.get("kv_lora_rank") or 0) + int(config.get("qk_rope_head_dim") or 0)
    size = int(config.get("head_dim") or hidden // heads)
    return AttentionSizes(layers, heads, kv_heads, size, pooled, latent if config.get("kv_lora_rank") else 0)


def cache_bytes_per_row(sizes: AttentionSizes, tokens: int, dtype: str, tensor_shards: int = 1) -> int:
    """Bytes of the KV cache, on one of the ranks that share the heads, for a row of so many tokens.

    An upper bound: layers that only look back a window of tokens are counted as whole.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    entries = sizes.latent or 2 * -(-sizes.kv_heads // tensor_shards) * sizes.head_size
    return blocks * BLOCK_TOKENS * sizes.pooled_layers * entries * DTYPE_BYTES[dtype]


def cache_bytes(sizes: AttentionSizes, rows: int, tokens: int, dtype: str, tensor_shards: int = 1) -> int:
    """Bytes for `rows` rows at the same time; vLLM keeps one block for itself."""
    return rows * cache_bytes_per_row(sizes, tokens, dtype, tensor_shards) + cache_bytes_per_row(
        sizes, 1, dtype, tensor_shards
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these keys that is a number."""
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)
