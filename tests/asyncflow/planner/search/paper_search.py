"""The paper's own search (HybridFlow, algorithms 1 and 2), corrected, kept as the oracle: enumerate everything.

Corrected: data-parallel sizes are integral, t divides the heads, p divides the layers and stays in its range, and a
split may leave devices idle. Plain Python, and nothing of the mapper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

Vector = tuple[float, float, float, float]  # generation, preparation, training, load
Costs = dict[frozenset[int], list[Vector | None]]  # by number of devices


def partitions(items: Sequence[int]) -> Iterator[list[frozenset[int]]]:
    """Every way to group items, each grouping once."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [frozenset({first}), *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], group | {first}, *smaller[index + 1 :]]


def splits(devices: int, sets: int) -> Iterator[tuple[int, ...]]:
    """Every split of at most so many devices, each set getting one or more."""
    for cuts in combinations(range(1, devices + 1), sets):
        yield tuple(b - a for a, b in zip((0, *cuts), cuts, strict=False))


def iteration_s(vectors: Sequence[Vector], staleness: int) -> float:
    """Stages one after the other, sets side by side; s + 1 steps under way, each set busy with one at a time."""
    chain = sum(max(vector[stage] for vector in vectors) for stage in range(3))
    return max(chain / (1 + staleness), *(vector[3] for vector in vectors))


def algorithm_1(costs: Costs, models: int, devices: int, staleness: int) -> dict[frozenset[frozenset[int]], float]:
    """The best step time of every placement that is possible."""
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


def algorithm_2(heads: int, layers: int, devices: int, node: int) -> set[tuple[int, int, int]]:
    """Every p-t-d of so many devices for a model: t up to a node, p up to what is left."""
    found = set()
    for t in range(1, min(node, devices) + 1):
        for p in range(1, devices // t + 1):
            if heads % t == 0 and layers % p == 0 and devices % (p * t) == 0:
                found.add((p, t, devices // (p * t)))
    return found
