"""Placement on several kinds of devices: assign each model to a kind, then search each kind on its own.

Models that share devices use one kind, so a placement is one placement per kind, side by side, and each of its stages
takes as long as the longest of theirs. Every assignment is tried, with the best placements of each kind by its own
step time. That is a heuristic order: the caller simulates the first few to find the best combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from operator import itemgetter

import numpy as np

from asyncflow.planner.costs.devices import Cluster, Refused
from asyncflow.planner.costs.set_costs import Allows
from asyncflow.planner.costs.workload import ModelWork, Workload
from asyncflow.planner.search.mapper import step_s
from asyncflow.planner.search.plan import Placement, ranked, ways_to_generate

EACH = 2  # placements of each kind that are combined

KindPlacements = tuple[Placement | None, ...]  # by kind; None for a kind without models


def heterogeneous_placements(
    models: Sequence[ModelWork], clusters: Sequence[Cluster], workload: Workload, keep: int, allows: Allows
) -> list[KindPlacements]:
    """The `keep` best placements for each way to generate. Raises Refused, with the numbers, if none fits."""
    each = keep if len(clusters) == 1 else EACH
    found: list[tuple[float, KindPlacements]] = []
    refusals: list[Refused] = []
    for works in ways_to_generate(models):
        of_this: list[tuple[float, KindPlacements]] = []
        for homes in product(range(len(clusters)), repeat=len(works)):
            best: list[Sequence[Placement | None]] = []
            try:
                for kind, cluster in enumerate(clusters):
                    own = [work for work, home in zip(works, homes, strict=True) if home == kind]
                    best.append(ranked(own, cluster, workload, each, allows) if own else [None])
            except Refused as refusal:
                refusals.append(refusal)
                continue
            of_this += [(combined_step_s(shared, workload.staleness), shared) for shared in product(*best)]
        found += sorted(of_this, key=itemgetter(0))[:keep]
    if not found:
        raise refusals[0]
    return [shared for _, shared in sorted(found, key=itemgetter(0))]


def combined_step_s(shared: KindPlacements, staleness: int) -> float:
    """Seconds a step of one placement per kind, side by side."""
    vectors = [[*p.stage_s.values(), max(pool.busy_s for pool in p.pools)] for p in shared if p]
    return float(step_s(np.max(np.array(vectors), axis=0), staleness))
