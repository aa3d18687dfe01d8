"""The search finds the same optimum as exhaustive enumeration."""

from __future__ import annotations

import random

import numpy as np
import pytest

from asyncflow.planner.costs.devices import Refused
from asyncflow.planner.costs.layouts import topologies
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.search.mapper import WIDTH, least_maximum, placements, search, step_s, undominated, vectors_of
from tests.asyncflow.planner.search import paper_search
from tests.asyncflow.planner.search.paper_search import Costs, Vector


def members(mask: int) -> frozenset[int]:
    return frozenset(index for index in range(mask.bit_length()) if mask >> index & 1)


def random_costs(random: random.Random, models: int, devices: int) -> Costs:
    """Random tables: smooth or jagged, with sets that need many devices, and ties."""
    jagged, hungry, grid = random.choice((0.0, 0.3, 2.0)), random.choice((0.0, 0.6)), random.choice((0.0, 1.0))
    costs: Costs = {}
    for mask in range(1, 1 << models):
        work = [random.uniform(0, 40) * random.choice((0, 1, 1)) for _ in range(3)]
        least = random.randint(1, devices) if random.random() < hungry else 1
        rows: list[Vector | None] = [None] * least
        for size in range(least, devices + 1):
            stages = [seconds / size * (1 + jagged * random.random()) for seconds in work]
            stages = [float(round(s)) if grid else s for s in stages]
            load = sum(stages) * random.choice((1.0, 1.0, 0.7))
            rows.append((stages[0], stages[1], stages[2], load))
        costs[members(mask)] = rows
    return costs


@pytest.mark.parametrize("seed", range(200))
def test_the_search_equals_the_papers_enumeration(seed: int):
    dice = random.Random(seed)
    models = dice.randint(1, 4)
    devices = 16 if seed % 8 == 0 else dice.randint(1, 12)
    staleness = dice.choice((0, 0, 1, 3))
    costs = random_costs(dice, models, devices)
    table = {mask: vectors_of(costs[members(mask)]) for mask in range(1, 1 << models)}
    oracle = paper_search.algorithm_1(costs, models, devices, staleness)
    if not oracle:
        with pytest.raises(Refused, match=f"{models} models fits on {devices} devices"):
            search(table, models, devices, staleness)
        return
    found = search(table, models, devices, staleness)
    assert [split.step_s for split in found] == pytest.approx(sorted(oracle.values())[: len(found)])
    assert len(found) == min(2, len(oracle))
    for split in found:
        chosen = [(members(mask), size) for mask, size in split.sets]
        assert sum(size for _, size in chosen) <= devices
        assert split.step_s == pytest.approx(oracle[frozenset(group for group, _ in chosen)])
        vectors = [vector for group, size in chosen if (vector := costs[group][size])]
        assert split.step_s == pytest.approx(paper_search.iteration_s(vectors, staleness))


@pytest.mark.parametrize(("models", "count"), [(3, 5), (4, 15), (5, 52), (6, 203)])
def test_placements_are_all_set_partitions_once(models: int, count: int):
    found = [frozenset(members(mask) for mask in placement) for placement in placements((1 << models) - 1)]
    assert len(found) == len(set(found)) == count
    assert set(found) == {frozenset(sets) for sets in paper_search.partitions(range(models))}


@pytest.mark.parametrize("name", LLAMA)
def test_layouts_are_the_papers_second_enumeration(name: str):
    shape = LLAMA[name]
    for devices in range(1, 65):
        ours = [(t.pp, t.tp, t.dp) for t in topologies(shape, devices, tensor_limit=8)]
        assert len(ours) == len(set(ours))
        assert set(ours) == paper_search.algorithm_2(paper_search.shards(shape), shape.layers, devices, node=8)


def test_a_synchronous_step_is_its_stages_in_turn_and_an_asynchronous_one_its_busiest_set():
    vector = np.array([6.0, 2.0, 4.0, 7.0])
    assert [step_s(vector, staleness) for staleness in (0, 1, 2)] == [12.0, 7.0, 7.0]


def test_the_least_maximum_of_two_falling_sequences():
    dice = np.random.default_rng(0)
    for _ in range(50):
        a, b = (np.minimum.accumulate(dice.choice([1.0, 2.5, 4.0, 9.0, np.inf], 9)) for _ in range(2))
        expected = [min(max(a[i], b[n - i]) for i in range(n + 1)) for n in range(9)]
        assert least_maximum(a, b).tolist() == expected


def test_undominated_points_are_those_that_no_other_matches():
    points = np.array([[1, 5], [2, 2], [2, 3], [5, 1], [2, 2], [6, 6]], dtype=np.float64)
    assert sorted(map(tuple, points[undominated(points)])) == [(1, 5), (2, 2), (5, 1)]
    assert undominated(np.empty((0, WIDTH))).size == 0
