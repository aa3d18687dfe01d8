"""Partitions rows into contiguous parts, balanced by number or by weight, without dividing a group.

All ranks wait for the heaviest part, so its weight is the minimum over all contiguous partitions. It is found by binary
search over the capacity of a part: filling parts greedily tells whether a capacity is enough.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def cut(rows: Rows, parts: int, groups: Rows | None = None, lengths: Rows | None = None) -> list[Rows]:
    """Cut `rows` into `parts` contiguous parts, possibly empty; `groups` and `lengths` are indexed by row.

    Without options the sizes differ by at most one, larger parts first. With `groups` or `lengths`, a part's weight is
    its number of rows or the sum of its lengths, and the heaviest part is as light as possible: at most an even share
    plus (1 - 1/parts) of the heaviest unit (row or group). Within that bound each part is near an even share of the
    remaining weight.
    """
    if groups is None and lengths is None:
        return np.array_split(rows, parts)
    weights = np.ones(len(rows), np.int64) if lengths is None else lengths[rows]
    if not weights.any():  # rows without tokens are spread by number
        weights = np.ones(len(rows), np.int64)
    allowed = np.arange(len(rows) + 1) if groups is None else _between_groups(groups[rows])
    reached = np.append(0, np.cumsum(weights))[allowed]
    return np.split(rows, allowed[_balanced(reached.tolist(), parts)])


def _between_groups(values: Rows) -> Rows:
    """Boundaries that separate no two rows of equal value, both ends included; a group's rows may be apart."""
    _, from_end, group = np.unique(values[::-1], return_index=True, return_inverse=True)
    last = len(values) - 1 - from_end[group[::-1]]  # of each row's group
    return np.append(0, np.flatnonzero(np.maximum.accumulate(last) == np.arange(len(values))) + 1)


def _balanced(reached: list[int], parts: int) -> list[int]:
    """Indices of parts - 1 boundaries into `reached`, the weight before each allowed boundary.

    The heaviest part is as light as possible; within that, each part in turn is as near as possible to an even share of
    the remaining weight.
    """
    total, heaviest = reached[-1], max((after - before for before, after in pairwise(reached)), default=0)
    # Lower bound: an even share, and the heaviest unit. The upper bound is always enough: greedy filling gives each
    # part but the last more than (total - heaviest) / parts.
    least, most = max(-(-total // parts), heaviest), (total + (parts - 1) * heaviest) // parts
    capacity = least + bisect_left(range(least, most), True, key=lambda c: _fits(reached, parts, c))
    earliest = [len(reached) - 1]  # from the right: first boundaries from which the remaining parts can hold the rest
    for _ in range(parts - 1):
        earliest.append(bisect_left(reached, reached[earliest[-1]] - capacity))
    boundaries, at = [], 0
    for part, first in zip(range(1, parts), reversed(earliest[1:]), strict=True):
        left = parts + 1 - part
        even = _nearest(reached, reached[at] * (left - 1) + total, left)
        at = min(max(even, first), _filled(reached, at, capacity))
        boundaries.append(at)
    return boundaries


def _fits(reached: list[int], parts: int, capacity: int) -> bool:
    at = 0
    for _ in range(parts):
        at = _filled(reached, at, capacity)
    return reached[at] == reached[-1]


def _filled(reached: list[int], at: int, capacity: int) -> int:
    """The last boundary that a part of this capacity can reach from boundary `at`."""
    return bisect_right(reached, reached[at] + capacity) - 1


def _nearest(reached: list[int], numerator: int, denominator: int) -> int:
    """The boundary nearest to the weight numerator / denominator; the later one of a tie."""
    above = bisect_left(reached, -(-numerator // denominator))
    below = max(above - 1, 0)
    return below if numerator - reached[below] * denominator < reached[above] * denominator - numerator else above
