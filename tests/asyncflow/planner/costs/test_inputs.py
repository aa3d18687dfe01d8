"""Inputs of the cost model: devices, shapes, lengths and work, and the errors for invalid ones."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
import pytest

from asyncflow.dataflow.algorithms.ppo import ppo as ppo_algorithm
from asyncflow.dataflow.trace import trace
from asyncflow.planner.costs.devices import CATALOGUE, Cluster, Efficiency, Refused
from asyncflow.planner.costs.shapes import LLAMA, Shape
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo, with_separate_generator, work_of

CONFIG = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def test_a_cluster_is_written_as_count_and_device():
    assert Cluster.parse("128xA100-80G") == Cluster(CATALOGUE["A100-80G"], 128)
    assert str(Cluster.parse(" 8xH200")) == "8xH200"


@pytest.mark.parametrize("text", ["128", "x", "A100-80G", "-1xH100", "8xA100", "twoxH100", ""])
def test_another_way_of_writing_is_refused_with_the_known_devices(text: str):
    with pytest.raises(Refused, match=r"COUNTxDEVICE.*know A100-80G, H100"):
        Cluster.parse(text)


def test_an_empty_pool_is_refused():
    with pytest.raises(Refused, match="at least 1 device"):
        Cluster.parse("0xH100")


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"efficiency.link is a share in \(0, 1\], not 1.5"):
        Efficiency(link=1.5)


def test_a_collective_uses_links_only_where_its_groups_tile_a_node():
    device = CATALOGUE["A100-80G"]
    assert device.rate(2) == device.rate(8) == 300e9 * 0.7
    assert device.rate(5) == device.rate(16) == 25e9 * 0.7
    assert device.rate(16, sharing=4) == 100e9 * 0.7
    assert device.rate(16, sharing=99) == 300e9 * 0.7  # the link to the network's neighbours


@pytest.mark.parametrize(("name", "billions"), [("7B", 6.74), ("13B", 13.02), ("34B", 33.74), ("70B", 68.98)])
def test_the_named_shapes_have_their_published_sizes(name: str, billions: float):
    assert LLAMA[name].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_shape_is_read_from_a_transformers_config():
    shape = Shape.from_config("small", CONFIG)
    assert (shape.layers, shape.kv_heads, shape.head_dimension, shape.tied) == (24, 2, 64, True)
    assert shape.parameters / 1e6 == pytest.approx(494, abs=1)
    assert Shape.from_config("mha", {**CONFIG, "num_key_value_heads": None}).kv_heads == 14
    assert shape.scoring().parameters < shape.parameters + 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "8 experts; only dense decoders"),
        ({"hidden_size": None}, "the config has no hidden_size"),
        ({"num_key_value_heads": 3}, "3 KV heads do not divide 14 heads"),
    ],
)
def test_a_config_that_is_not_modelled_is_refused(change: dict[str, int | None], message: str):
    with pytest.raises(ValueError, match=message):
        Shape.from_config("odd", {**CONFIG, **change})


def test_the_expected_longest_is_that_of_sampled_batches():
    lengths = Lengths.long_tailed(median=300, sigma=0.8, limit=2048)
    samples = np.random.default_rng(0).choice(lengths.tokens, (4000, 32))
    assert lengths.expected_maximum(32) == pytest.approx(samples.max(axis=1).mean(), rel=0.01)
    assert lengths.expected_maximum(1) == pytest.approx(lengths.mean)
    assert lengths.maximum <= 2048 and Lengths.fixed(7).expected_maximum(99) == 7


@pytest.mark.parametrize("limit", [10, 40, 80, 400])
def test_lengths_that_were_cut_are_those_of_the_larger_limit(limit: int):
    """Lengths with a constant hazard are predicted correctly from lengths under another limit."""
    dice = random.Random(0)
    whole = [1 + int(math.log(dice.random()) / math.log(1 - 1 / 30)) for _ in range(4000)]
    cut = Lengths(tuple(sorted(min(40.0, length) for length in whole)))
    assert cut.under(limit, before=40).mean == pytest.approx(sum(min(limit, one) for one in whole) / 4000, rel=0.05)


def test_who_never_ended_uses_whatever_there_is():
    assert Lengths.fixed(40).under(90, before=40).tokens == (90.0,)


def test_measured_lengths_are_sorted_thinned_and_none_is_refused():
    assert Lengths.measured([9, 3, 3]).tokens == (3.0, 3.0, 9.0)
    many = Lengths.measured(range(1, 10_001))
    assert len(many.tokens) < 100 and many.maximum == 10_000
    assert many.mean == pytest.approx(5000, rel=0.01)
    with pytest.raises(ValueError, match="one value or more"):
        Lengths.measured([])


def test_impossible_workloads_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="mini_batches is 0"):
        Workload(8, Lengths.fixed(1), Lengths.fixed(1), mini_batches=0)
    with pytest.raises(ValueError, match="staleness is -1 versions"):
        Workload(8, Lengths.fixed(1), Lengths.fixed(1), staleness=-1)


def test_the_work_is_read_from_the_dataflow():
    shape = LLAMA["7B"]
    shapes = {"policy": shape, "critic": shape.scoring(), "reference": shape, "reward": shape.scoring()}
    found = sorted(work_of(trace(ppo_algorithm), shapes), key=lambda w: w.role)
    assert [work.role for work in found if work.rereads] == ["policy"]  # for its loss; the paper's does without
    assert [msgspec.structs.replace(w, rereads=False) for w in found] == sorted(ppo(shape), key=lambda w: w.role)
    by_rule = work_of(trace(ppo_algorithm), {"policy": shape, "critic": shape.scoring(), "reference": shape})
    assert {work.role for work in by_rule} == {"policy", "critic", "reference"}
    with pytest.raises(Refused, match="no shape for the policy"):
        work_of(trace(ppo_algorithm), {"critic": shape})


def test_generation_apart_is_a_model_that_receives_the_policys_weights():
    generator, policy, *others = with_separate_generator(ppo(LLAMA["7B"]))
    assert generator == ModelWork("generator", LLAMA["7B"], generates=1, receives_from="policy")
    assert (policy.role, policy.generates, policy.trains) == ("policy", 0, True)
    assert others == ppo(LLAMA["7B"])[1:]
