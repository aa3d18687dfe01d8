"""A shard plan covers exactly the tensors of the transformers model, each cut into the right shards."""

from __future__ import annotations

from math import prod
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Decoder, Head, Parameter, ShardPlan

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "plain llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
}
MODELS: dict[Head, Any] = {
    "tokens": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "score": AutoModelForSequenceClassification,
}
DECODER = Decoder.of(CONFIGS["qwen2"].to_dict())


def parameters(plan: ShardPlan) -> dict[str, Parameter]:
    found = [p for stage in range(plan.pp) for p in plan.parameters(stage)]
    assert len({p.name for p in found}) == len(found)
    return {p.name: p for p in found}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("head", MODELS)
@pytest.mark.parametrize("stages", [1, 2])
def test_names_and_shapes_are_those_of_transformers(config: PretrainedConfig, head: Head, stages: int):
    labelled = type(config)(**{**config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        model = MODELS[head].from_config(labelled)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = {name: p.shape for name, p in parameters(ShardPlan(Decoder.of(config.to_dict(), head), stages, 2)).items()}
    if stages > 1 and config.tie_word_embeddings and head == "tokens":
        assert ours.pop(TOKEN_HEAD) == ours[EMBEDDING]  # the copy on the last stage
    assert ours == theirs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shards_tile_what_is_cut(config: PretrainedConfig):
    plan = ShardPlan(Decoder.of(config.to_dict()), 2, 4)
    for parameter in parameters(plan).values():
        times = 1 if parameter.cut is None else 4
        assert prod(plan.shard_shape(parameter)) * times == parameter.elements


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("stages", "shards"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_a_checkpoint_gets_every_entry_once(config: PretrainedConfig, stages: int, shards: int):
    decoder = Decoder.of(config.to_dict())
    plan = ShardPlan(decoder, stages, shards)
    places = [(stage, index) for stage in range(stages) for index in range(shards)]
    written = [
        (parameter.name, plan.shard_start(parameter, index), plan.shard_elements(parameter))
        for stage, index in places
        for parameter in plan.written_by(stage, index)
    ]
    assert len({box[:2] for box in written}) == len(written)
    assert sum(elements for *_, elements in written) == sum(p.elements for p in ShardPlan(decoder).parameters(0))


def test_stages_hold_neighbouring_layers_and_the_ends_what_stands_there():
    plan = ShardPlan(DECODER, pp=2)
    assert [list(plan.layers(stage)) for stage in range(2)] == [[0, 1], [2, 3]]
    first, last = ({p.name for p in plan.parameters(stage)} for stage in range(2))
    assert EMBEDDING in first - last
    assert {"model.norm.weight", TOKEN_HEAD} <= last - first


def test_into_heads_is_cut_by_rows_and_out_of_them_by_columns():
    found = parameters(ShardPlan(Decoder.of(CONFIGS["llama"].to_dict()), tp=2))
    layer = {name.removeprefix("model.layers.0."): p.cut for name, p in found.items() if ".layers.0." in name}
    assert {name for name, cut in layer.items() if cut == 1} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    whole = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.bias", "mlp.down_proj.bias"}
    assert {name for name, cut in layer.items() if cut is None} == whole


def test_norms_over_heads_get_a_part_of_their_gradient_on_each_rank():
    found = parameters(ShardPlan(Decoder.of(CONFIGS["qwen3"].to_dict()), tp=2))
    partial = {name.rpartition(".self_attn.")[2] for name, p in found.items() if p.partial}
    assert partial == {"q_norm.weight", "k_norm.weight"}


def test_what_an_engine_fuses_is_named_in_its_order():
    found = parameters(ShardPlan(DECODER))
    fused: dict[str, list[str]] = {}
    for parameter in found.values():
        if ".layers.1." in parameter.name and parameter.fused:
            fused.setdefault(parameter.fused, []).append(parameter.name.removeprefix("model.layers.1."))
    assert fused == {
        "model.layers.1.self_attn.qkv_proj.weight": [f"self_attn.{n}_proj.weight" for n in "qkv"],
        "model.layers.1.self_attn.qkv_proj.bias": [f"self_attn.{n}_proj.bias" for n in "qkv"],
        "model.layers.1.mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    }


@pytest.mark.parametrize(
    ("sizes", "pp", "tp", "message"),
    [
        ({"layers": 5}, 2, 1, "layers 5 can't be divided over 2 pipeline stages"),
        ({"heads": 6, "kv_heads": 6}, 1, 4, "attention heads 6 can't be divided over 4 tensor-parallel ranks"),
        ({"kv_heads": 2}, 1, 4, "key-value heads 2 can't be divided over 4 tensor-parallel ranks"),
        ({"intermediate": 50}, 1, 4, "intermediate size 50 can't be divided over 4 tensor-parallel ranks"),
        ({"vocabulary": 63}, 1, 2, "vocabulary 63 can't be divided over 2 tensor-parallel ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(sizes: dict[str, int], pp: int, tp: int, message: str):
    with pytest.raises(ValueError, match=message):
        ShardPlan(msgspec.structs.replace(DECODER, **sizes), pp, tp)


def test_other_decoders_are_refused():
    with pytest.raises(ValueError, match="model_type 'gpt2' has no sharding plan: one of llama, mistral, qwen2, qwen3"):
        Decoder.of({"model_type": "gpt2"})
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    with pytest.raises(ValueError, match="layers of type sliding_attention"):
        Decoder.of(sliding.to_dict())
    mistral = {"model_type": "mistral", "sliding_window": 4096}
    with pytest.raises(ValueError, match="mistral with a sliding window of 4096 tokens: only full"):
        Decoder.of(mistral)
