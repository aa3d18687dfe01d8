"""Fully sharded ranks receive each missing entry once, and none that they own, in all small layouts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from protocols.layout.topology import GenerationGrouping, Topology
from workers.parallel.plan import Decoder, ShardPlan
from workers.resharding.plan import (
    Layouts,
    Trained,
    exchange_groups,
    gathered_stage,
    owned_slice,
    same_index_groups,
    transition,
)

DECODER = Decoder(
    family="qwen3",
    layers=4,
    hidden=32,
    intermediate=64,
    heads=8,
    kv_heads=4,
    head_size=8,
    vocabulary=48,
    tied=False,
    qk_norm=True,
)
BUCKET = 500  # entries; tensors begin and end inside a bucket


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def layouts() -> Iterator[tuple[Topology, GenerationGrouping]]:
    """Every small layout of fully sharded ranks; those with p = t = 1 also with generation as tensor ranks."""
    for p, t, d in np.ndindex(3, 3, 3):
        at = Topology(2 ** int(p), 2 ** int(t), 2 ** int(d))
        if at.dp == 1 or at.world_size > 16:
            continue
        for regrouped in (at, Topology(1, at.dp, 1)) if at.replica_size == 1 else (at,):
            for pp in divisors(regrouped.pp):
                for tp in divisors(regrouped.tp):
                    yield at, GenerationGrouping(regrouped, pp, tp)


CASES = list(layouts())


@pytest.mark.parametrize(("at", "grouping"), CASES, ids=[f"{at}({g.topology})->{g.pp}-{g.tp}" for at, g in CASES])
def test_each_missing_entry_arrives_once(at: Topology, grouping: GenerationGrouping):
    plan, trained = ShardPlan(DECODER, at.pp, at.tp), Trained(at, at.dp)
    both = Layouts.of(plan, grouping, trained)
    for rank in range(at.world_size):
        needed = {p.name: p for p in both.gather.parameters(gathered_stage(grouping, rank))}
        seen = {name: np.zeros(both.gather.shard_elements(p), np.int64) for name, p in needed.items()}
        place = at.coordinates(rank)
        for parameter in plan.parameters(place.pp):
            part = owned_slice(parameter, both, trained, place)
            seen[part.name][part.start : part.start + part.elements] += 1
        for move in transition(plan, grouping, rank, BUCKET, trained):
            for owner, slices in zip(move.owners, move.slices, strict=True):
                for part in slices if owner != rank else ():
                    seen[part.name][part.start : part.start + part.elements] += 1
        assert all((times == 1).all() for times in seen.values())


@pytest.mark.parametrize(("at", "grouping"), CASES[::5])
def test_members_of_a_collective_have_it_in_one_order(at: Topology, grouping: GenerationGrouping):
    plan, trained = ShardPlan(DECODER, at.pp, at.tp), Trained(at, at.dp)
    moves = [transition(plan, grouping, rank, BUCKET, trained) for rank in range(at.world_size)]
    for group in (*exchange_groups(grouping, trained), *same_index_groups(grouping, trained)):
        orders = [[move for move in moves[rank] if move.members == tuple(group)] for rank in group]
        assert all(order == orders[0] for order in orders)


def test_shares_that_do_not_divide_are_refused_with_the_numbers():
    at = Topology(1, 1, 5)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: 48 rows or columns .* don't divide over 5 replicas"):
        transition(ShardPlan(DECODER), GenerationGrouping(at), 0, BUCKET, Trained(at, 5))
