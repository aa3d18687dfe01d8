"""Generalised advantage estimation: its identities, and the tokens that receive the score and the KL penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.columns import take
from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs, Rollouts, Scores, Values
from tests.workers.advantages import batches
from tests.workers.advantages.batches import GROUPS, MASK, column
from workers.advantages.gae import advantages_and_returns, gae
from workers.advantages.rewards import rewards_to_go, token_rewards

seeds = st.integers(0, 2**32 - 1)
masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6).map(
    lambda rows: Jagged.from_rows(rows, np.uint8)
)
Inputs = tuple[Rollouts, LogProbs, Values, Scores]


def estimate(rewards: Jagged, values: Jagged, mask: Jagged, gamma: float, gae_lambda: float) -> tuple[Any, Any]:
    return advantages_and_returns(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)


def inputs(mask: Jagged = MASK, groups: tuple[int, ...] = GROUPS, seed: int = 0) -> Inputs:
    """Random inputs of `gae` for responses with this mask."""
    rows = batches.rollouts(mask, groups, seed)
    return rows, batches.reference(rows, seed), batches.values(rows, seed), batches.scores(rows, seed=seed)


@given(masks, seeds, st.floats(0, 1), st.floats(0, 1))
def test_it_is_the_discounted_sum_of_td_errors_as_if_masked_tokens_were_not_there(
    mask: Jagged, seed: int, gamma: float, gae_lambda: float
):
    rewards, values = column(mask, seed), column(mask, seed + 1)
    advantages, returns = (mask.with_values(a) for a in estimate(rewards, values, mask, gamma, gae_lambda))
    for row in range(len(mask)):
        inside = mask[row] != 0
        r, v = rewards[row][inside].astype(np.float64), values[row][inside].astype(np.float64)
        errors = r + gamma * np.append(v[1:], 0.0)[: len(v)] - v
        decay = (gamma * gae_lambda) ** np.arange(len(v))
        want = np.array([errors[t:] @ decay[: len(v) - t] for t in range(len(v))])
        np.testing.assert_allclose(advantages[row][inside], want, atol=1e-9)
        np.testing.assert_allclose(returns[row][inside], want + v, atol=1e-9)
        assert not advantages[row][~inside].any()
        assert not returns[row][~inside].any()


@given(seeds)
def test_lambda_1_gamma_1_is_return_minus_value(seed: int):
    mask = Jagged.from_rows([np.ones(6)], np.uint8)
    rewards, values = column(mask, seed), column(mask, seed + 1)
    advantages, returns = estimate(rewards, values, mask, 1.0, 1.0)
    to_go = np.cumsum(rewards.values[::-1].astype(np.float64))[::-1]
    np.testing.assert_allclose(returns, to_go, atol=1e-9)
    np.testing.assert_allclose(advantages, to_go - values.values, atol=1e-9)


@given(seeds)
def test_lambda_0_is_the_td_error(seed: int):
    mask = Jagged.from_rows([np.ones(6)], np.uint8)
    rewards, values = column(mask, seed), column(mask, seed + 1)
    advantages, _ = estimate(rewards, values, mask, 0.9, 0.0)
    v = values.values.astype(np.float64)
    np.testing.assert_allclose(advantages, rewards.values + 0.9 * np.append(v[1:], 0) - v, atol=1e-9)


# --- the stage


def test_with_lambda_1_a_return_is_the_discounted_reward_to_go():
    rollouts, reference, values, scores = inputs()
    numbers = {"gamma": 0.5, "gae_lambda": 1.0, "kl_coefficient": 0.3}
    result = gae(rollouts, reference, values, scores, kl_estimator="k3", whiten_advantages=False, **numbers).batch
    rewards = token_rewards(rollouts, reference, scores.scores, 0.3, "k3").rewards
    np.testing.assert_allclose(result.returns.values, rewards_to_go(rewards, MASK, 0.5), atol=1e-6)
    by_value = (result.returns.values - values.values.values) * MASK.values
    np.testing.assert_allclose(result.advantages.values, by_value, atol=1e-6)


def test_the_experience_is_the_rows_that_came_in():
    rollouts, reference, values, scores = inputs()
    batch = gae(rollouts, reference, values, scores).batch
    batch.check()
    assert np.array_equal(batch.sample_ids, rollouts.sample_ids)
    assert (batch.responses, batch.log_probs, batch.values) == (rollouts.responses, rollouts.log_probs, values.values)
    assert (batch.loss_mask, batch.reference) == (MASK, reference.log_probs)


def test_metrics_are_means_over_trained_tokens():
    rollouts, reference, values, scores = inputs()
    measured = gae(rollouts, reference, values, scores, whiten_advantages=False)
    inside, batch = MASK.values != 0, measured.batch
    want = {
        "kl": (rollouts.log_probs.values - reference.log_probs.values)[inside].mean(),
        "advantage_std": batch.advantages.values[inside].std(),
        "value_mean": values.values.values[inside].mean(),
        "return_mean": batch.returns.values[inside].mean(),
    }
    assert measured.metrics.values == pytest.approx(want, abs=1e-6)


@given(seeds)
def test_the_order_of_rows_changes_nothing_else(seed: int):
    order = np.random.default_rng(seed).permutation(len(MASK))
    rollouts, reference, values, scores = inputs(seed=seed)
    straight = gae(rollouts, reference, values, scores).batch
    shuffled = gae(take(rollouts, order), take(reference, order), take(values, order), take(scores, order)).batch
    np.testing.assert_allclose(shuffled.advantages.values, take(straight, order).advantages.values, atol=1e-5)


def test_a_response_without_a_trained_token_is_refused():
    with pytest.raises(ValueError, match="row 1 has no trained token"):
        gae(*inputs(Jagged.from_rows([[1], [0, 0]], np.uint8), (2,)))
