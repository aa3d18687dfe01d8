"""Tiny random models of the families that people train, as transformers folders: made in a fraction of a second each.

Head sizes are 32 or more, for which vLLM's CPU attention has kernels. Each family keeps what is particular to it:
scaled rotary positions, learned positions with an offset, fused projections, transposed layers, experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests import tiny

COMMON = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # so that distributions are not uniform
    "pad_token_id": tiny.PAD_ID,
    "eos_token_id": tiny.EOS_ID,
    "bos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG_ROPE = {"rope_type": "longrope", "long_factor": [4.0] * 16, "short_factor": [1.1] * 16, "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 126}),
    "gpt_neox": ("gpt_neox", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
    "phi3": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


# Families whose layers have a projection of their own kind, and so no gate, key-value heads or width of a head to set.
OF_THEIR_OWN = {"gpt2": ("hidden_size", "intermediate_size", "num_", "head_dim", "max_position"), "opt": ("head_dim",)}


def config(family: str, vocabulary: int = len(tiny.VOCABULARY)) -> PreTrainedConfig:
    """The config of a tiny model of a family in CONFIGS."""
    kind, own = CONFIGS[family]
    common = {k: v for k, v in COMMON.items() if not k.startswith(OF_THEIR_OWN.get(kind, ("none",)))}
    return AutoConfig.for_model(kind, **{**common, **own, "vocab_size": vocabulary})


def make(family: str, folder: str | Path, seed: int = 0, *, vocabulary: int = len(tiny.VOCABULARY)) -> Path:
    """A random language model of a family and its tokenizer, as a transformers folder."""
    return tiny.save_random(AutoModelForCausalLM.from_config, config(family, vocabulary), folder, seed)
