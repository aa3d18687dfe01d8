"""Grouping rows by prompt, in any order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.workers.advantages.batches import ids_of
from workers.advantages.groups import (
    flat_share,
    group_deviations,
    group_means,
    groups_of,
    have_spread,
)

IDS = ids_of((3, 2, 1))[[4, 0, 5, 1, 3, 2]]  # prompts 1 0 2 0 1 0
SCORES = np.array([5.0, 1.0, 7.0, 2.0, 5.0, 6.0], np.float32)


def test_statistics_by_hand_a_group_of_one_standing_for_itself():
    groups = groups_of(IDS)
    assert groups.sizes.tolist() == [2, 3, 1, 3, 2, 3]
    assert group_means(SCORES, groups).tolist() == [5, 3, 0, 3, 5, 3]
    spread = float(np.std([1, 2, 6], ddof=1))
    np.testing.assert_allclose(group_deviations(SCORES, groups), [0, spread, 1, spread, 0, spread])


def test_a_group_teaches_where_its_scores_differ():
    groups = groups_of(IDS)
    assert have_spread(SCORES, groups).tolist() == [False, True, False, True, False, True]
    assert flat_share(SCORES, groups) == pytest.approx(0.5)


def test_no_rows_are_no_groups():
    none, scores = groups_of(IDS[:0]), SCORES[:0]
    assert len(group_means(scores, none)) == len(group_deviations(scores, none)) == len(have_spread(scores, none)) == 0
    assert flat_share(scores, none) == 0
