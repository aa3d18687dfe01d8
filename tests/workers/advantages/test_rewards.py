"""Rewards per token: the tokens that receive score and penalty, and the rewards to go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.jagged import Jagged
from tests.workers.advantages.batches import MASK, column, reference, rollouts
from workers.advantages.kl import kl_terms
from workers.advantages.rewards import last_trained, rewards_to_go, token_rewards
from workers.settings import KlEstimator


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_paid_per_token_and_the_score_at_the_last_trained_one(estimator: KlEstimator):
    rows = rollouts()
    anchor, scores = reference(rows), np.arange(7, dtype=np.float32)
    earned = token_rewards(rows, anchor, scores, 0.3, estimator)
    rewards, penalties = MASK.with_values(earned.rewards), []
    for row in range(len(MASK)):
        trained = np.flatnonzero(MASK[row])
        mu, ref = rows.log_probs[row][trained], anchor.log_probs[row][trained]
        want = -0.3 * kl_terms(mu.astype(np.float64), ref.astype(np.float64), estimator)
        penalties += (want / -0.3).tolist()
        want[-1] += scores[row]
        np.testing.assert_allclose(rewards[row][trained], want, atol=1e-12)
        assert not rewards[row][MASK[row] == 0].any()
    assert earned.kl == pytest.approx(np.mean(penalties))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_rewards_to_go_are_discounted_by_trained_tokens_only(seed: int, gamma: float):
    rewards = column(MASK, seed).values.astype(np.float64) * (MASK.values != 0)
    got = MASK.with_values(rewards_to_go(rewards, MASK, gamma))
    for row, mask in enumerate(MASK):
        inside = mask != 0
        r = MASK.with_values(rewards)[row][inside]
        want = [sum(gamma**s * x for s, x in enumerate(r[t:])) for t in range(len(r))]
        np.testing.assert_allclose(got[row][inside], want, atol=1e-9)
        assert not got[row][~inside].any()


def test_a_response_without_a_trained_token_is_refused():
    with pytest.raises(ValueError, match="row 1 has no trained token"):
        last_trained(Jagged.from_rows([[1], [0, 0]], np.uint8))
