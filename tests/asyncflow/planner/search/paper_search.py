"""The paper's own search (HybridFlow, algorithms 1 and 2) with corrections: the oracle that enumerates everything.

Corrections: data-parallel sizes are integral, t divides the heads (and all else that tensor shards divide), p divides
the layers and stays in its range, and a split may leave devices idle. Plain Python; it shares no code with the mapper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import gcd

from asyncflow.planner.costs.shapes import Shape

Vector = tuple[float, float, float, float]  # generation, preparation, training, load
Costs = dict[frozenset[int], list[Vector | None]]  # by number of devices


def partitions(items: Sequence[int]) -> Iterator[list[frozenset[int]]]:
    """Every set partition of the items, once."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [frozenset({first}), *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], group | {first}, *smaller[index + 1 :]]


def splits(devices: int, sets: int) -> Iterator[tuple[int, ...]]:
    """Every split of at most `devices` devices in which each set gets at least one."""
    for cuts in combinations(range(1, devices + 1), sets):
        yield tuple(b - a for a, b in zip((0, *cuts), cuts, strict=False))


def iteration_s(vectors: Sequence[Vector], staleness: int) -> float:
    """Seconds of a step: stages run one after the other, sets side by side, and s + 1 steps overlap."""
    chain = sum(max(vector[stage] for vector in vectors) for stage in range(3))
    return max(chain / (1 + staleness), *(vector[3] for vector in vectors))


def algorithm_1(costs: Costs, models: int, devices: int, staleness: int) -> dict[frozenset[frozenset[int]], float]:
    """The best step time of every possible placement."""
    best: dict[frozenset[frozenset[int]], float] = {}
    for sets in partitions(range(models)):
        for sizes in splits(devices, len(sets)):
            vectors = [costs[one][size] for one, size in zip(sets, sizes, strict=True)]
            if any(vector is None for vector in vectors):
                continue
            seconds = iteration_s([vector for vector in vectors if vector is not None], staleness)
            key = frozenset(sets)
            best[key] = min(best.get(key, float("inf")), seconds)
    return best


def shards(shape: Shape) -> int:
    """The largest number of tensor shards that divides all that they cut: its divisors are the possible t."""
    return gcd(shape.heads, shape.kv_heads, shape.intermediate, shape.vocabulary)


def algorithm_2(heads: int, layers: int, devices: int, node: int) -> set[tuple[int, int, int]]:
    """Every p-t-d of `devices` devices for a model, with t up to the size of a node."""
    found = set()
    for t in range(1, min(node, devices) + 1):
        for p in range(1, devices // t + 1):
            if heads % t == 0 and layers % p == 0 and devices % (p * t) == 0:
                found.add((p, t, devices // (p * t)))
    return found
