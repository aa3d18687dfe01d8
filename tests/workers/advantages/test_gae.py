"""Advantages and returns: the identities of generalised advantage estimation, and where reward and penalty land."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.columns import Jagged, take
from protocols.messages import LogProbs, Rollouts, Scores, Values
from workers.advantages.gae import KlEstimator, advantages_and_returns, gae, kl_terms, whiten

seeds = st.integers(0, 2**32 - 1)
masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6).map(
    lambda rows: Jagged.from_rows(rows, np.uint8)
)
Inputs = tuple[Rollouts, LogProbs, Values, Scores]


def column(mask: Jagged, seed: int) -> Jagged:
    """A float32 column of normal numbers."""
    return mask.with_values(np.random.default_rng(seed).normal(size=len(mask.values)).astype(np.float32))


def estimate(rewards: Jagged, values: Jagged, mask: Jagged, gamma: float, gae_lambda: float) -> tuple[Any, Any]:
    return advantages_and_returns(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)


def inputs(mask: Jagged, seed: int = 0) -> Inputs:
    """What `gae` takes, random, for responses with this mask."""
    rng, ids = np.random.default_rng(seed), np.arange(len(mask), dtype=np.int64)
    rollouts = Rollouts(
        sample_ids=ids,
        prompts=Jagged.from_rows([[1]] * len(mask), np.int32),
        references=Jagged.from_texts([""] * len(mask)),
        responses=mask.with_values(mask.values.astype(np.int32)),
        log_probs=column(mask, seed + 1),
        versions=mask.with_values(np.zeros(len(mask.values), np.int32)),
        loss_mask=mask,
        finishes=np.zeros(len(mask), np.uint8),
    )
    values = Values(sample_ids=ids, values=column(mask, seed + 2), versions=np.zeros(len(mask), np.int64))
    scores = Scores(sample_ids=ids, scores=rng.normal(size=len(mask)).astype(np.float32))
    return rollouts, LogProbs(sample_ids=ids, log_probs=column(mask, seed + 3)), values, scores


MASK = Jagged.from_rows([[1, 1, 1], [0, 1, 0, 1, 0], [1]], np.uint8)


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


# --- KL


def test_k1_and_k3_have_the_divergence_as_their_mean_and_k2_to_second_order():
    rng = np.random.default_rng(0)
    logits, direction = rng.normal(size=8), rng.normal(size=8)
    log_p = logits - np.log(np.exp(logits).sum())
    gaps = []
    for size in (0.2, 0.1):
        moved = logits + size * direction
        log_q = moved - np.log(np.exp(moved).sum())
        divergence = float(np.exp(log_p) @ (log_p - log_q))
        k1, k2, k3 = (float(np.exp(log_p) @ kl_terms(log_p, log_q, k)) for k in ("k1", "k2", "k3"))
        assert k1 == pytest.approx(divergence, abs=1e-12)
        assert k3 == pytest.approx(divergence, abs=1e-12)
        gaps.append(abs(k2 - divergence))
    assert gaps[0] / gaps[1] > 6  # the gap is of third order: halving the step divides it by about 8


@given(st.lists(st.floats(-10, 10), min_size=1))
def test_k2_and_k3_are_never_negative(differences: list[float]):
    difference = np.array(differences)
    for estimator in ("k2", "k3"):
        assert (kl_terms(np.zeros_like(difference), difference, estimator) >= 0).all()


def test_estimators_by_hand():
    policy, reference = np.array([-1.0]), np.array([-1.5])
    assert kl_terms(policy, reference, "k1")[0] == pytest.approx(0.5)
    assert kl_terms(policy, reference, "k2")[0] == pytest.approx(0.125)
    assert kl_terms(policy, reference, "k3")[0] == pytest.approx(np.exp(-0.5) + 0.5 - 1)
    with pytest.raises(ValueError, match=r"'k4': one of k1, k2, k3"):
        kl_terms(policy, reference, "k4")  # type: ignore[arg-type]


# --- whitening


@given(masks, seeds)
def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_mask(mask: Jagged, seed: int):
    advantages = np.random.default_rng(seed).normal(3.0, 5.0, len(mask.values))
    white = whiten(advantages, mask.values)
    inside = mask.values != 0
    if inside.sum() >= 2:
        assert white[inside].mean() == pytest.approx(0, abs=1e-9)
        assert white[inside].std() == pytest.approx(1, abs=1e-6)
        assert not white[~inside].any()


def test_equal_advantages_whiten_to_0_and_a_single_one_stays():
    assert np.abs(whiten(np.full(5, 0.1), np.ones(5, np.uint8))).max() < 1e-6
    assert whiten(np.array([4.0, 9.0]), np.array([1, 0], np.uint8))[0] == 4.0


# --- the stage


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_paid_per_token_and_the_score_at_the_last_trained_one(estimator: KlEstimator):
    rollouts, reference, values, scores = inputs(MASK)
    result = gae(
        *(rollouts, reference, values, scores),
        gamma=0.5,
        gae_lambda=1.0,
        kl_coefficient=0.3,
        kl_estimator=estimator,
        whiten_advantages=False,
    ).batch
    # With lambda = 1 a return is the discounted reward to go, so rewards can be read from returns.
    for row, trained in enumerate([[0, 1, 2], [1, 3], [0]]):
        returns = result.returns[row][trained].astype(np.float64)
        rewards = returns - 0.5 * np.append(returns[1:], 0.0)
        mu, ref = rollouts.log_probs[row][trained], reference.log_probs[row][trained]
        want = -0.3 * kl_terms(mu.astype(np.float64), ref.astype(np.float64), estimator)
        want[-1] += scores.scores[row]
        np.testing.assert_allclose(rewards, want, atol=1e-6)
    by_value = (result.returns.values - values.values.values) * MASK.values
    np.testing.assert_allclose(result.advantages.values, by_value, atol=1e-6)


def test_the_experience_is_the_rows_that_came_in():
    rollouts, reference, values, scores = inputs(MASK)
    batch = gae(rollouts, reference, values, scores).batch
    batch.check()
    assert np.array_equal(batch.sample_ids, rollouts.sample_ids)
    assert (batch.responses, batch.log_probs, batch.values) == (rollouts.responses, rollouts.log_probs, values.values)
    assert batch.loss_mask == MASK


def test_metrics_are_means_over_trained_tokens():
    rollouts, reference, values, scores = inputs(MASK)
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
    rollouts, reference, values, scores = inputs(MASK, seed)
    straight = gae(rollouts, reference, values, scores).batch
    shuffled = gae(take(rollouts, order), take(reference, order), take(values, order), take(scores, order)).batch
    np.testing.assert_allclose(shuffled.advantages.values, take(straight, order).advantages.values, atol=1e-5)


def test_a_response_without_a_trained_token_is_refused():
    with pytest.raises(ValueError, match="row 1 has no trained token"):
        gae(*inputs(Jagged.from_rows([[1], [0, 0]], np.uint8)))
