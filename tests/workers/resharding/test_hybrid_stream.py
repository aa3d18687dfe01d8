"""Generation weights are streamed to an engine that copies them, while the ranks keep their training shards."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from protocols.layout.topology import Backend, GenerationGrouping, Topology, generation_grouping
from tests.workers.ranks import Ranks, Worlds
from tests.workers.resharding.test_hybrid_engine import BUCKET_BYTES, folders  # noqa: F401 - a fixture
from workers.parallel.backends import trained_model
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.resharding.hybrid_engine import HybridEngine
from workers.settings import Model

SWITCHES: list[tuple[Backend, str]] = [
    ("3d", "1-2-2 -> 1-1"),
    ("3d", "2-2-1 -> 1-2"),  # embedding and head on different stages, one matrix where they are tied
    ("3d", "1-2-2 -> 1-2"),  # equal layouts: nothing is received
    ("zero1", "1-2-2 -> 1-1"),
    ("fsdp", "1-1-4 -> 1-2"),
]


class Streamed(NamedTuple):
    """What one rank received by streaming, next to a full switch of the same weights."""

    same: bool  # weights, and those that training has left
    order: list[list[str]]
    received: tuple[int, int]
    peak: int
    trained_bytes: int
    largest: int  # bytes of a tensor of the generation shard


def streamed(folder: str, backend: Backend, switch: str) -> Streamed:
    """Run by every rank: stream the weights, then switch layouts."""
    train, generate = (Topology.parse(layout) for layout in switch.split(" -> "))
    model = trained_model(Model(path=folder), Sharding(train, backend), regrouped=True)
    engine = HybridEngine(model, generation_grouping(backend, train, generate), bucket_bytes=BUCKET_BYTES)
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    weights, order, stream = {}, [], engine.stream()
    while True:
        try:
            part = next(stream)
        except StopIteration as ended:
            transition = ended.value
            break
        order.append(list(part))
        weights |= {name: tensor.clone() for name, tensor in part.items()}
    same = all(torch.equal(parameter, before[name]) for name, parameter in model.parameters.items())
    switched = engine.to_generation()
    same = same and weights.keys() == engine.weights.keys()
    same = same and all(torch.equal(weights[name], weight) for name, weight in engine.weights.items())
    return Streamed(
        same,
        order,
        (transition.received_bytes, switched.received_bytes),
        transition.peak_bytes,
        sum(p.numel() * p.itemsize for p in before.values()),
        max(w.numel() * w.itemsize for w in weights.values()),
    )


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> Ranks:
    return worlds[4]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("backend", "switch"), SWITCHES)
def test_what_streams_by_is_what_a_switch_brings(world, folders, backend: Backend, switch: str, tied: bool):  # noqa: F811
    seen: list[Streamed] = world.call(streamed, folders[tied], backend, switch)
    assert all(rank.same for rank in seen)
    for rank in seen:
        assert rank.received[0] == rank.received[1]
        names = [name for part in rank.order for name in part]
        assert len(names) == len(set(names))
        # Besides the training shards: a bucket, and per stage one tensor that is begun and one that is complete.
        assert rank.peak <= rank.trained_bytes + 3 * BUCKET_BYTES + 4 * rank.largest
    if switch.startswith("1-2-2"):
        assert seen[0].order == seen[1].order  # ranks of one engine stream at the same time


def test_it_streams_from_the_training_layout_only(folders):  # noqa: F811
    model = trained_model(Model(path=folders[True]), ONE_DEVICE, regrouped=True)
    engine = HybridEngine(model, GenerationGrouping(Topology()))
    engine.to_generation()
    with pytest.raises(RuntimeError, match="stream from the training layout"):
        next(engine.stream())
    vanilla = HybridEngine(model, GenerationGrouping(Topology(), style="vanilla"))
    with pytest.raises(RuntimeError, match="'vanilla' gathers the model whole"):
        next(vanilla.stream())
