"""Aggregations: each token's weight follows from counts that are summed over ranks."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.jagged import Jagged
from workers.losses.aggregation import Counts, counts_of, reduce_loss, token_weights
from workers.settings import Aggregation, Loss

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
MASK = Jagged.from_rows([[1, 0, 1, 1], [0, 0], [1]], np.uint8)
masks = st.lists(st.lists(st.integers(0, 1), max_size=7), min_size=1, max_size=8).map(
    lambda rows: Jagged.from_rows(rows, np.uint8)
)


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ("token-mean", [1 / 4, 0, 1 / 4, 1 / 4, 0, 0, 1 / 4]),
        ("sequence-mean-token-sum", [1 / 2, 0, 1 / 2, 1 / 2, 0, 0, 1 / 2]),
        ("sequence-mean-token-mean", [1 / 6, 0, 1 / 6, 1 / 6, 0, 0, 1 / 2]),
        ("sequence-mean-fixed-length", [1 / 20, 0, 1 / 20, 1 / 20, 0, 0, 1 / 20]),
    ],
)
def test_weights_by_hand_and_an_untrained_row_counts_nowhere(how: Aggregation, weights: list[float]):
    got = token_weights(MASK, counts_of(MASK), Loss(aggregation=how, fixed_length=10))
    np.testing.assert_allclose(got.values, weights, rtol=1e-12)
    assert np.array_equal(got.offsets, MASK.offsets)


def test_a_fixed_length_that_nobody_gave_is_no_divisor():
    with pytest.raises(ValueError, match=r"loss\.fixed_length = 0: want the divisor in tokens"):
        token_weights(MASK, counts_of(MASK), Loss(aggregation="sequence-mean-fixed-length"))


def test_counts_are_of_trained_tokens_and_of_rows_that_have_one():
    assert counts_of(MASK) == Counts(tokens=4, rows=2)
    assert counts_of(MASK.take([])) == Counts(0, 0)


@given(masks, st.integers(0, 8))
def test_counts_of_parts_add_up(mask: Jagged, at: int):
    rows = np.arange(len(mask))
    assert counts_of(mask.take(rows[:at])) + counts_of(mask.take(rows[at:])) == counts_of(mask)


@given(masks, st.sampled_from(AGGREGATIONS), st.integers(0, 2**32 - 1))
def test_aggregations_are_the_means_that_their_names_say(mask: Jagged, how: Aggregation, seed: int):
    losses = mask.with_values(np.random.default_rng(seed).normal(size=len(mask.values)))
    rows = [row[m != 0] for row, m in zip(losses, mask, strict=True) if m.any()]
    want = 0.0
    if rows:
        want = {
            "token-mean": np.concatenate(rows).mean(),
            "sequence-mean-token-sum": np.mean([row.sum() for row in rows]),
            "sequence-mean-token-mean": np.mean([row.mean() for row in rows]),
            "sequence-mean-fixed-length": np.mean([row.sum() / 5 for row in rows]),
        }[how]
    weights = token_weights(mask, counts_of(mask), Loss(aggregation=how, fixed_length=5))
    got = reduce_loss(torch.from_numpy(losses.values.copy()), torch.from_numpy(weights.values.copy()))
    assert got.item() == pytest.approx(want, abs=1e-10)


def test_a_float32_loss_stays_float32():
    assert reduce_loss(torch.ones(3), torch.ones(3, dtype=torch.float64)).dtype == torch.float32
