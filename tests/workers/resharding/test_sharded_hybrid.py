"""Fully sharded ranks generate in any layout and receive the lower bound, (1/(t_g p_g) - 1/S) M bytes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from protocols.layout.topology import GenerationGrouping, Topology, generating_topology
from tests.workers.ranks import Ranks, Worlds
from tests.workers.resharding.test_hybrid_engine import (
    BUCKET_BYTES,
    BUDGET,
    Generating,
    at_responses,
    check_generation,
    folders,  # noqa: F401 - a fixture
    in_order,
    likelihood,
    part,
    rows,
    sizes,
)
from workers.parallel.fully_sharded import FullyShardedModel
from workers.parallel.model import ParallelModel
from workers.resharding.hybrid_engine import HybridEngine

# Trained by S = 4 ranks. The first two are sharded over all of them, so they generate like four tensor ranks.
SWITCHES = ["1-1-4 -> 1-2", "1-1-4 -> 1-1", "1-2-2 -> 1-1", "2-1-2 -> 2-1"]


def layouts(switch: str) -> tuple[Topology, GenerationGrouping]:
    train, generate = (Topology.parse(layout) for layout in switch.split(" -> "))
    return train, GenerationGrouping(generating_topology("fsdp", train), generate.pp, generate.tp)


class Seen(NamedTuple):
    """What one rank observes: its generation, and whether training continued as without a switch."""

    generating: Generating
    same_after: bool


# --- what every rank runs


def generating(folder: str, switch: str) -> Seen:
    train, grouping = layouts(switch)
    model = FullyShardedModel(folder, train)
    engine = HybridEngine(model, grouping, bucket_bytes=BUCKET_BYTES)
    transition = engine.to_generation()
    mine = part(part(rows(), engine.place.dp, grouping.topology.dp), engine.place.micro_dp, grouping.micro_dp)
    logits = in_order(engine.forward(mine, BUDGET, at_responses), mine)
    weights = {name: weight.data.clone() for name, weight in engine.weights.items()}
    engine.to_training()
    straight = FullyShardedModel(folder, train)
    for either in (model, straight):
        step(either)
    same = all(torch.equal(p, straight.parameters[name]) for name, p in model.parameters.items())
    return Seen(Generating(transition, weights, logits, False), same)


def step(model: ParallelModel) -> None:
    model.backward(part(rows(), model.place.dp, model.topology.dp), BUDGET, likelihood)
    model.clip_gradient(1.0)
    torch.optim.AdamW(model.optimized.values(), lr=1e-2).step()
    model.all_gather_updated()
    model.release_gradient()


def stepped(folder: str, switch: str) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of all rows after a step, in the training and in the generation layout."""
    train, grouping = layouts(switch)
    model = FullyShardedModel(folder, train)
    engine = HybridEngine(model, grouping, bucket_bytes=BUCKET_BYTES)
    engine.to_generation()
    engine.to_training()
    step(model)
    training = in_order(model.forward(rows(), BUDGET, at_responses), rows())
    engine.to_generation()
    return training, in_order(engine.forward(rows(), BUDGET, at_responses), rows())


# --- the same model, with the lower bound of bytes


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> Ranks:
    return worlds[4]


@pytest.fixture(scope="module", params=SWITCHES)
def switched(request: pytest.FixtureRequest, world: Ranks, folders: dict[bool, str]) -> tuple[str, list[Seen]]:  # noqa: F811
    return request.param, world.call(generating, folders[False], request.param)


def test_generation_has_the_whole_models_weights_and_logits(switched, folders):  # noqa: F811
    switch, seen = switched
    check_generation([rank.generating for rank in seen], folders[False], layouts(switch)[1])


def test_received_bytes_are_the_lower_bound(switched, folders):  # noqa: F811
    """Untied. Layers' matrices follow the formula; of norms, embedding and head a rank receives what it lacks."""
    switch, seen = switched
    train, grouping = layouts(switch)
    matrices, norms, end = sizes(folders[False])
    final_norm, ranks, d = 4 * 32, train.world_size, train.dp
    for rank, one in enumerate(seen):
        at, place = train.coordinates(rank), grouping.coordinates(rank)
        expected = matrices // (grouping.pp * grouping.tp) - matrices // ranks
        expected += norms // grouping.pp - norms // (train.pp * d)
        if place.pp == 0:
            expected += end // grouping.tp - (end // (train.tp * d) if at.pp == 0 else 0)
        if place.pp == grouping.pp - 1:
            last = at.pp == train.pp - 1
            expected += end // grouping.tp - (end // (train.tp * d) if last else 0)
            expected += final_norm - (final_norm // d if last else 0)
        assert one.generating.transition.received_bytes == expected, rank


def test_a_rank_holds_its_generation_shard_its_share_and_a_bucket(switched):
    _, seen = switched
    for one in seen:
        transition = one.generating.transition
        assert transition.generation_bytes == sum(4 * w.numel() for w in one.generating.weights.values())
        assert transition.peak_bytes <= transition.generation_bytes + transition.redundant_bytes + BUCKET_BYTES


def test_training_after_switching_back_is_unaffected(switched):
    assert all(one.same_after for one in switched[1])


@pytest.mark.parametrize("switch", ["1-1-4 -> 1-2"])
def test_generation_sees_the_trained_weights_of_a_tied_model(world, folders, switch: str):  # noqa: F811
    for training, generation in world.call(stepped, folders[True], switch):
        torch.testing.assert_close(torch.cat(training), torch.cat(generation), atol=1e-5, rtol=1e-5)
