"""The planner proposes only layouts that can be built: a random sample of its answers is built on meta tensors."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from transformers import AutoConfig, PretrainedConfig

from asyncflow.planner.costs.devices import CATALOGUE, Cluster
from asyncflow.planner.costs.layouts import Layout, topologies
from asyncflow.planner.costs.set_costs import SetCosts
from asyncflow.planner.costs.shapes import Shape
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo, with_separate_generator
from asyncflow.planner.search.plan import make_plan
from asyncflow.planner.simulation.scenarios import layout_of_placed
from protocols.layout.topology import GenerationGrouping, Topology
from workers.parallel.decoder import DecoderShard
from workers.parallel.groups import RankGroup
from workers.parallel.plan import Decoder, Head, ShardPlan
from workers.resharding.plan import transition

WORK = Workload(64, Lengths.fixed(256), Lengths.fixed(256), micro_batch_tokens=1024)
SMALL = msgspec.structs.replace(CATALOGUE["A100-80G"], memory_bytes=2e9)  # the models below need several
HEADS: dict[str, Head] = {"policy": "tokens", "generator": "tokens", "critic": "value", "reward": "score"}
SIZES: dict[str, dict[str, Any]] = {
    "few key-value heads": {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 2},
    "one key-value head": {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 1},
    "three heads": {"model_type": "qwen3", "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 64},
    "an odd vocabulary": {"model_type": "llama", "num_attention_heads": 8, "vocab_size": 32_001},
    "an odd intermediate size": {"model_type": "qwen2", "num_attention_heads": 8, "intermediate_size": 2_050},
    "a prime number of layers": {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 7},
    "tied embeddings": {"model_type": "qwen3", "num_attention_heads": 8, "tie_word_embeddings": True, "head_dim": 96},
}


def config_of(sizes: dict[str, Any]) -> PretrainedConfig:
    common = {"hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12, "vocab_size": 32_000}
    given = {**common, "num_key_value_heads": sizes["num_attention_heads"], "tie_word_embeddings": False, **sizes}
    return AutoConfig.for_model(given.pop("model_type"), **given, attn_implementation="eager")


def build(config: PretrainedConfig, role: str, layout: Layout) -> None:
    """Every stage's module on meta tensors, with its parameters' shapes, and the way to the generation layout."""
    topology, decoder = layout.topology, Decoder.of(config.to_dict(), HEADS.get(role, "tokens"))
    plan = ShardPlan(decoder, topology.pp, topology.tp)
    tensor_group = RankGroup(range(topology.tp), 0, None)
    for stage in range(topology.pp):
        shard = DecoderShard(config, plan, stage, tensor_group, layout.recompute)
        held = {name: tuple(parameter.shape) for name, parameter in shard.named_parameters(remove_duplicate=False)}
        assert held.items() >= {p.name: plan.shard_shape(p) for p in plan.parameters(stage)}.items()
        assert all(parameter.is_meta for parameter in shard.parameters())
    if layout.gen_pp:
        transition(plan, GenerationGrouping(topology, layout.gen_pp, layout.gen_tp), 0, 1 << 40)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_sample_of_what_is_proposed_is_built(sizes: dict[str, Any]):
    config, dice = config_of(sizes), random.Random(str(sizes))
    models = ppo(Shape.from_config("sampled", config.to_dict()))
    for devices in dice.sample(range(6, 25), 2):
        plan = make_plan(models, Cluster(SMALL, devices), WORK)
        for placement in filter(None, (plan.chosen, plan.runner_up)):
            for model in (model for pool in placement.pools for model in pool.models):
                build(config, model.role, layout_of_placed(model))
    found = SetCosts(models, Cluster(SMALL, 24), WORK)
    layouts = {
        (models[index].role, layout)
        for row in found.chosen.values()
        for choice in filter(None, row)
        for index, layout in choice.layouts
    }
    sampled = dice.sample(sorted(layouts, key=str), min(8, len(layouts)))
    assert any(layout.topology.replica_size > 1 for _, layout in layouts), "the models are too large for one device"
    for role, layout in sampled:
        build(config, role, layout)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_topology_that_a_plan_allows_is_considered(sizes: dict[str, Any]):
    config = config_of(sizes)
    decoder, shape = Decoder.of(config.to_dict()), Shape.from_config("sampled", config.to_dict())
    for devices in (1, 6, 8, 12, 24):
        possible = set()
        for pp in range(1, devices + 1):
            for tp in range(1, min(8, devices // pp) + 1):
                try:
                    ShardPlan(decoder, pp, tp)
                except ValueError:
                    continue
                possible |= {Topology(pp, tp, devices // (pp * tp))} if devices % (pp * tp) == 0 else set()
        assert set(topologies(shape, devices, tensor_limit=8)) == possible


def test_a_family_without_a_sharding_plan_is_whole_on_each_rank_and_generates_where_it_trains_on_one_device():
    config = {
        "model_type": "olmo2", "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "vocab_size": 32_000,
    }  # fmt: skip
    shape = Shape.from_config("olmo2", config)
    assert list(topologies(shape, 4, 8)) == [Topology(1, 1, 4)]
    assert list(topologies(shape, 4, 8, hybrid=True)) == []
    assert list(topologies(shape, 1, 8, hybrid=True)) == [Topology()]
    with pytest.raises(ValueError, match="model_type 'olmo2' has no sharding plan"):
        Decoder.of(config)
    trained = [ModelWork("policy", shape, generates=1, trains=True)]
    found = SetCosts(trained, Cluster(CATALOGUE["A100-80G"], 4), WORK)
    assert {layout.topology for choice in found.chosen[1] if choice for _, layout in choice.layouts} == {Topology()}
    found = SetCosts(with_separate_generator(trained), Cluster(CATALOGUE["A100-80G"], 4), WORK)
    best = found.chosen[2][4]
    assert best is not None and best.layouts[0][1].topology == Topology(1, 1, 4), "it trains on replicas"
