"""Whitened advantages have mean 0 and deviation 1 over the masked-in tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.advantages.whitening import whiten

masks = st.lists(st.integers(0, 1), min_size=1, max_size=40).map(lambda row: np.array(row, np.uint8))


@given(masks, st.integers(0, 2**32 - 1))
def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_mask(mask: np.ndarray, seed: int):
    advantages, inside = np.random.default_rng(seed).normal(3.0, 5.0, len(mask)), mask != 0
    white = whiten(advantages, mask)
    if inside.sum() >= 2:
        assert white[inside].mean() == pytest.approx(0, abs=1e-9)
        deviation = advantages[inside].std()  # nearly equal values stay below 1, because of the 1e-8 in the denominator
        assert white[inside].std() == pytest.approx(deviation / (deviation + 1e-8), abs=1e-6)
        assert not white[~inside].any()


def test_equal_advantages_whiten_to_0_and_a_single_one_stays():
    assert np.abs(whiten(np.full(5, 0.1), np.ones(5, np.uint8))).max() < 1e-6
    assert whiten(np.array([4.0, 9.0]), np.array([1, 0], np.uint8)).tolist() == [4.0, 0.0]


def test_a_masked_number_that_is_not_finite_is_0_afterwards():
    white = whiten(np.array([4.0, np.nan, 2.0, -np.inf]), np.array([1, 0, 1, 0], np.uint8))
    np.testing.assert_allclose(white, [1.0, 0.0, -1.0, 0.0], atol=1e-6)
