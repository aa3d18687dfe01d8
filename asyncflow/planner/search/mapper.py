"""Exact search: which models share devices, and how many devices each set of models gets.

The cost of a set of models on n devices is a vector: seconds of generation, preparation and training in a step, and
the busy seconds of its devices. Sets run side by side, so a placement's vector is the maximum over its sets, and
`step_s` maps it to the objective. Partial placements are extended set by set. Of those over the same models only the
ones on the Pareto front of (devices used, vector) are kept, and only while a bound says that they can still win.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from asyncflow.planner.costs.devices import Refused

STAGES = ("generation", "preparation", "training")
LOAD = len(STAGES)  # the column after the stages
WIDTH = LOAD + 1

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Table = Mapping[int, Floats]  # set of models as a bit mask -> [devices + 1, WIDTH] seconds; inf if it can't run


class Split(msgspec.Struct, frozen=True):
    """A placement, with the best split of the devices over its sets."""

    sets: tuple[tuple[int, int], ...]  # (mask of models, devices), the set of the lowest model first
    vector: tuple[float, ...]  # seconds: the stages, then the busiest set's load
    step_s: float

    @property
    def placement(self) -> tuple[int, ...]:
        """The sets of models that share devices, without device counts."""
        return tuple(mask for mask, _ in self.sets)


def step_s(vectors: Any, staleness: int) -> Any:
    """Seconds a step of cost vectors along the last axis.

    At staleness 0 the stages of a step run one after the other. At staleness s, s + 1 steps overlap: a step takes
    1 / (s + 1) of that time, but no less than the busy time of the busiest set.
    """
    chain = vectors[..., :LOAD].sum(axis=-1) / (1 + staleness)
    return np.maximum(chain, vectors[..., LOAD])


def sets_with_the_first(mask: int) -> Iterator[int]:
    """Every subset that contains the lowest model of a mask, the whole first."""
    lowest = mask & -mask
    rest = subset = mask ^ lowest
    while True:
        yield subset | lowest
        if not subset:
            return
        subset = (subset - 1) & rest


def placements(mask: int) -> Iterator[tuple[int, ...]]:
    """Every partition of a mask's models into sets: 5 of 3 models, 15 of 4, 52 of 5, 203 of 6."""
    if not mask:
        yield ()
    else:
        for first in sets_with_the_first(mask):
            yield from ((first, *others) for others in placements(mask ^ first))


def search(table: Table, models: int, devices: int, staleness: int = 0, keep: int = 2) -> list[Split]:
    """The best splits of the `keep` best placements, best first; at most `devices` devices are used.

    Raises Refused if no placement of all models fits.
    """
    return _Search(table, models, devices, staleness, keep).run()


class _States(msgspec.Struct):
    """Partial placements over the same sets: row i uses used[i] devices, split as splits[i], and costs vectors[i]."""

    used: Ints  # [A]
    vectors: Floats  # [A, WIDTH]
    splits: Ints  # [A, sets]

    def take(self, rows: npt.NDArray[Any]) -> _States:
        return _States(self.used[rows], self.vectors[rows], self.splits[rows])


class _Search:
    def __init__(self, table: Table, models: int, devices: int, staleness: int, keep: int) -> None:
        self.table, self.devices, self.staleness, self.keep = table, devices, staleness, keep
        self.all = (1 << models) - 1
        self.bounds = bounds(table, models, devices)
        self.found: list[Split] = []

    def run(self) -> list[Split]:
        nothing = _States(np.zeros(1, np.int64), np.zeros((1, WIDTH)), np.zeros((1, 0), np.int64))
        self._extend((), self.all, nothing)
        if not self.found:
            raise Refused(f"no placement of {self.all.bit_count()} models fits on {self.devices} devices")
        return self.found

    @property
    def _limit(self) -> float:
        """The step time that a placement must beat."""
        return self.found[-1].step_s if len(self.found) == self.keep else np.inf

    def _extend(self, sets: tuple[int, ...], rest: int, states: _States) -> None:
        if not rest:
            return self._finish(sets, states)
        for mask in sets_with_the_first(rest):
            longer = self._combine(states, mask, rest ^ mask)
            if len(longer.used):
                self._extend((*sets, mask), rest ^ mask, longer)
        return None

    def _combine(self, states: _States, mask: int, rest: int) -> _States:
        """Extend each state with each size of the next set; keep those that can still win with the remaining models."""
        sizes = self._sizes(mask)
        rows, columns = np.nonzero(states.used[:, None] + sizes[None, :] <= self.devices)
        used = states.used[rows] + sizes[columns]
        vectors = np.maximum(states.vectors[rows], self.table[mask][sizes[columns]])
        optimistic = np.maximum(vectors, self.bounds[rest][self.devices - used]) if rest else vectors
        able = np.nonzero(step_s(optimistic, self.staleness) < self._limit)[0]
        splits = np.column_stack([states.splits[rows[able]], sizes[columns[able]]])
        longer = _States(used[able], vectors[able], splits)
        return (
            longer.take(undominated(np.column_stack([longer.used.astype(np.float64), longer.vectors])))
            if rest
            else longer
        )

    def _sizes(self, mask: int) -> Ints:
        """Sizes of a set for which the placement can still win, whatever happens to the other models."""
        vectors = self.table[mask]
        if others := self.all ^ mask:
            vectors = np.maximum(vectors, self.bounds[others][::-1])
        best = step_s(vectors, self.staleness)
        return np.nonzero((best < self._limit) & np.isfinite(best))[0]

    def _finish(self, sets: tuple[int, ...], states: _States) -> None:
        seconds = step_s(states.vectors, self.staleness)
        row = int(np.lexsort((states.used, seconds))[0])
        if not seconds[row] < self._limit:
            return
        chosen = tuple(zip(sets, map(int, states.splits[row]), strict=True))
        split = Split(chosen, tuple(map(float, states.vectors[row])), float(seconds[row]))
        self.found = sorted([*self.found, split], key=lambda s: s.step_s)[: self.keep]


def bounds(table: Table, models: int, devices: int) -> dict[int, Floats]:
    """Lower bounds for every set of models, [devices + 1, WIDTH]: no placement does better in any column.

    Each column is minimised on its own: the least maximum over the sets of any partition.
    """
    lowest: dict[int, Floats] = {}
    for mask in range(1, 1 << models):
        best = np.full((devices + 1, WIDTH), np.inf)
        for first in sets_with_the_first(mask):
            alone = np.minimum.accumulate(table[first])
            others = mask ^ first
            for column in range(WIDTH):
                together = least_maximum(alone[:, column], lowest[others][:, column]) if others else alone[:, column]
                best[:, column] = np.minimum(best[:, column], together)
        lowest[mask] = best
    return lowest


def least_maximum(a: Floats, b: Floats) -> Floats:
    """min over i of max(a[i], b[n-i]) for every n, of falling a and b: counts the devices that each threshold needs."""
    thresholds = np.unique(np.concatenate([a, b]))
    thresholds = thresholds[np.isfinite(thresholds)]
    needed = np.searchsorted(-a, -thresholds) + np.searchsorted(-b, -thresholds)  # non-increasing in the threshold
    reached = np.searchsorted(-needed, -np.arange(len(a)))
    return np.append(thresholds, np.inf)[reached]


def undominated(points: Floats) -> Ints:
    """Indices of the Pareto front (smaller is better); one of several equal rows."""
    order = np.lexsort(points.T[::-1])
    points = points[order]
    place = 0
    while place < len(points):
        alive = (points < points[place]).any(axis=1)
        alive[place] = True
        points, order = points[alive], order[alive]
        place = int(alive[: place + 1].sum())
    return order


def vectors_of(rows: Sequence[Sequence[float] | None]) -> Floats:
    """A set's entry of the table, from its vectors by device count; None if it can't run."""
    return np.array([row if row is not None else (np.inf,) * WIDTH for row in rows], dtype=np.float64)
