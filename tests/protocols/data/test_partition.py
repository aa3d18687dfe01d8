"""Partitioning rows: no contiguous partition has a lighter heaviest part, and no group is split."""

from __future__ import annotations

from itertools import accumulate, combinations_with_replacement, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.partition import cut


def parts_of(
    rows: int, parts: int, groups: list[int] | None = None, lengths: list[int] | None = None
) -> list[list[int]]:
    per_row = [None if values is None else np.array(values, np.int64) for values in (groups, lengths)]
    return [part.tolist() for part in cut(np.arange(rows), parts, *per_row)]


def test_plain_rows_are_cut_by_number_and_the_first_parts_take_what_is_left():
    assert parts_of(8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert parts_of(1, 3) == [[0], [], []]


def test_groups_and_lengths_are_those_of_the_row_wherever_a_part_begins():
    rows, lengths = np.array([2, 3, 4]), np.array([90, 90, 1, 1, 2])
    assert [part.tolist() for part in cut(rows, 2, None, lengths)] == [[2, 3], [4]]
    assert [part.tolist() for part in cut(rows, 2, np.array([0, 4, 4, 7, 7]))] == [[2], [3, 4]]


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=20))
def test_a_group_whose_rows_stand_apart_is_not_cut(parts: int, groups: list[int]):
    cuts = [{groups[row] for row in part} for part in parts_of(len(groups), parts, groups=groups)]
    assert sum(map(len, cuts)) == len(set(groups))


def parts_weighed(weights: list[int], parts: int) -> list[int]:
    cuts = parts_of(len(weights), parts, lengths=weights)
    assert len(cuts) == parts
    assert [row for part in cuts for row in part] == list(range(len(weights)))
    return [sum(weights[row] for row in part) for part in cuts]


weights_lists = st.lists(st.integers(0, 50), max_size=8).filter(any)


@given(weights_lists, st.integers(1, 4))
def test_no_contiguous_cut_has_a_lighter_heaviest_part(weights: list[int], parts: int):
    reached = [0, *accumulate(weights)]
    inner = combinations_with_replacement(reached, parts - 1)
    best = min(max(after - before for before, after in pairwise((0, *cuts, reached[-1]))) for cuts in inner)
    assert max(parts_weighed(weights, parts)) == best


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=200).filter(any), st.integers(1, 130))
def test_the_heaviest_part_keeps_its_bound(weights: list[int], parts: int):
    assert max(parts_weighed(weights, parts)) * parts <= sum(weights) + (parts - 1) * max(weights)


def test_the_heaviest_part_decides_and_the_rest_is_even():
    assert parts_of(5, 2, lengths=[8, 1, 1, 3, 3]) == [[0], [1, 2, 3, 4]]
    assert parts_of(3, 2, lengths=[6, 5, 3]) == [[0], [1, 2]]  # 6 is nearer to 7 than 11
    assert parts_of(3, 2, lengths=[1, 2, 1]) == [[0, 1], [2]]  # 1 and 3 are as near to 2: the later
    assert parts_of(4, 2, lengths=[0, 0, 0, 0]) == [[0, 1], [2, 3]]
    # the boundaries nearest to equal shares of 4 would give parts of 2, 7 and 3
    assert parts_of(4, 3, lengths=[2, 5, 2, 3]) == [[0], [1], [2, 3]]
    # the first row is the heaviest part in any case; the rest is split evenly: 5 and 7, not 2 and 10
    assert parts_of(5, 3, lengths=[16, 2, 3, 5, 2]) == [[0], [1, 2], [3, 4]]
