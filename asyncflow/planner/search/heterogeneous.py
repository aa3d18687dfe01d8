"""Devices of several kinds: which models go to which, each kind mapped for its own.

A set of models stands on devices of one kind, so a placement is one of each kind's, side by side: its stages are as
long as the longest of theirs. Every way to share the models out is looked at, with the best placements of each kind
by its own step; whoever wants to know which combination is best simulates the first few.
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

EACH = 2  # placements of each kind's models that are combined

KindPlacements = tuple[Placement | None, ...]  # of each kind's models; None where it has none


def across_kinds(
    models: Sequence[ModelWork], clusters: Sequence[Cluster], workload: Workload, keep: int, allows: Allows
) -> list[KindPlacements]:
    """The `keep` most hopeful placements of each way to generate. Raises Refused, with the numbers, where none fits."""
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
            of_this += [(together_s(shared, workload.staleness), shared) for shared in product(*best)]
        found += sorted(of_this, key=itemgetter(0))[:keep]
    if not found:
        raise refusals[0]
    return [shared for _, shared in sorted(found, key=itemgetter(0))]


def together_s(shared: KindPlacements, staleness: int) -> float:
    """Seconds a step of placements side by side."""
    vectors = [[*p.stage_s.values(), max(pool.busy_s for pool in p.pools)] for p in shared if p]
    return float(step_s(np.max(np.array(vectors), axis=0), staleness))
