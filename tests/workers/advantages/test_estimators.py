"""ReMax and REINFORCE++, and the properties that all estimators without a critic share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, Rollouts
from protocols.stage import Measured
from tests.workers.advantages.batches import MASK, reference, rollouts, scores, values
from workers.advantages.dapo import dapo
from workers.advantages.dr_grpo import dr_grpo
from workers.advantages.gae import gae
from workers.advantages.grpo import group_relative, grpo
from workers.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from workers.advantages.remax import remax
from workers.advantages.rewards import rewards_to_go, token_rewards
from workers.advantages.rloo import rloo
from workers.advantages.whitening import whiten

ROWS = rollouts()
INSIDE = MASK.values != 0
seeds = st.integers(0, 2**32 - 1)

ESTIMATORS: dict[str, Callable[[Rollouts], Measured[Experience]]] = {
    "grpo": lambda r: grpo(r, reference(r), scores(r)),
    "group_relative": lambda r: group_relative(r, scores(r)),
    "dr_grpo": lambda r: dr_grpo(r, scores(r)),
    "dapo": lambda r: dapo(r, scores(r)),
    "rloo": lambda r: rloo(r, reference(r), scores(r)),
    "remax": lambda r: remax(r, reference(r), scores(r), scores(r, seed=9)),
    "reinforce_pp": lambda r: reinforce_pp(r, reference(r), scores(r)),
    "reinforce_pp_baseline": lambda r: reinforce_pp_baseline(r, reference(r), scores(r)),
}


# --- ReMax


@given(seeds)
def test_remax_is_the_reward_to_go_less_the_greedy_score(seed: int):
    rows = rollouts(seed=seed)
    anchor, own, greedy = reference(rows, seed), scores(rows, seed=seed), scores(rows, seed=seed + 1)
    got = remax(rows, anchor, own, greedy, kl_coefficient=0.2, kl_estimator="k2")
    earned = token_rewards(rows, anchor, own.scores, 0.2, "k2")
    to_go = MASK.with_values(rewards_to_go(earned.rewards, MASK, 1.0))
    for row, mask in enumerate(MASK):
        want = (to_go[row] - greedy.scores[row]) * (mask != 0)
        np.testing.assert_allclose(got.batch.advantages[row], want, atol=1e-5)
    assert got.metrics.values["kl"] == pytest.approx(earned.kl)
    assert got.metrics.values["baseline_mean"] == pytest.approx(greedy.scores.mean(), abs=1e-6)


def test_remax_without_baseline_and_penalty_is_reinforce():
    """Every token's advantage is the response's score."""
    own = scores(ROWS)
    got = remax(ROWS, reference(ROWS), own, scores(ROWS, [0.0] * 7), kl_coefficient=0.0).batch.advantages.values
    np.testing.assert_allclose(got, np.repeat(own.scores, MASK.lengths) * INSIDE)


def test_remax_is_0_where_the_sample_is_the_greedy_response():
    got = remax(ROWS, reference(ROWS), scores(ROWS), scores(ROWS), kl_coefficient=0.0)
    assert not got.batch.advantages.values.any()


# --- REINFORCE++


@given(seeds, st.floats(0.5, 1))
def test_reinforce_pp_whitens_the_rewards_to_go_over_the_batch(seed: int, gamma: float):
    rows = rollouts(seed=seed)
    anchor, own = reference(rows, seed), scores(rows, seed=seed)
    got = reinforce_pp(rows, anchor, own, gamma=gamma, kl_coefficient=0.2).batch.advantages.values
    returns = rewards_to_go(token_rewards(rows, anchor, own.scores, 0.2, "k1").rewards, MASK, gamma)
    np.testing.assert_allclose(got, whiten(returns, MASK.values), atol=1e-5)
    assert got[INSIDE].mean() == pytest.approx(0, abs=1e-5)
    assert got[INSIDE].std() == pytest.approx(1, abs=1e-4)


def test_reinforce_pp_is_gae_without_a_critic():
    """lambda = 1 and values of 0 leave the discounted rewards to go."""
    nothing = values(ROWS)
    nothing = type(nothing)(
        sample_ids=nothing.sample_ids,
        values=MASK.with_values(np.zeros(len(INSIDE), np.float32)),
        versions=nothing.versions,
    )
    ours = reinforce_pp(ROWS, reference(ROWS), scores(ROWS), gamma=0.9).batch
    theirs = gae(ROWS, reference(ROWS), nothing, scores(ROWS), gamma=0.9, gae_lambda=1.0).batch
    np.testing.assert_allclose(ours.advantages.values, theirs.advantages.values, atol=1e-6)


# --- all estimators without a critic


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_experience_is_the_rows_that_came_in_with_zeros_for_the_critic(name: str):
    batch = ESTIMATORS[name](ROWS).batch
    batch.check()
    assert np.array_equal(batch.sample_ids, ROWS.sample_ids)
    assert (batch.prompts, batch.responses, batch.log_probs) == (ROWS.prompts, ROWS.responses, ROWS.log_probs)
    assert batch.loss_mask == MASK
    assert not batch.returns.values.any()
    assert not batch.values.values.any()
    assert not batch.advantages.values[~INSIDE].any()


@pytest.mark.parametrize("odd", [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize("name", [*ESTIMATORS, "gae"])
def test_masked_numbers_change_no_advantage_and_no_metric(name: str, odd: float):
    def result(number: float) -> Measured[Experience]:
        def masked(column: Jagged) -> Jagged:
            return column.with_values(np.where(INSIDE, column.values, np.float32(number)))

        rows = structs.replace(ROWS, log_probs=masked(ROWS.log_probs))
        if name == "gae":
            of, anchor = values(rows), reference(rows)
            of = structs.replace(of, values=masked(of.values))
            return gae(rows, structs.replace(anchor, log_probs=masked(anchor.log_probs)), of, scores(rows))
        return ESTIMATORS[name](rows)

    ours, theirs = result(odd), result(0.0)
    assert ours.batch.advantages == theirs.batch.advantages
    assert ours.batch.returns == theirs.batch.returns
    assert ours.metrics.values == theirs.metrics.values


@pytest.mark.parametrize("name", ["grpo", "rloo", "remax", "reinforce_pp", "reinforce_pp_baseline"])
def test_the_references_log_probs_go_on_to_the_loss_and_their_kl_is_measured(name: str):
    result, anchor = ESTIMATORS[name](ROWS), reference(ROWS)
    assert result.batch.reference == anchor.log_probs
    kl = (ROWS.log_probs.values - anchor.log_probs.values)[INSIDE].mean()
    assert result.metrics.values["kl"] == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("name", ["group_relative", "dr_grpo", "dapo"])
def test_without_a_reference_there_are_zeros_and_no_kl(name: str):
    result = ESTIMATORS[name](ROWS)
    assert not result.batch.reference.values.any()
    assert "kl" not in result.metrics.values


@pytest.mark.parametrize("name", ["grpo", "group_relative", "dr_grpo", "dapo", "rloo", "remax"])
def test_the_spread_of_the_advantages_is_measured(name: str):
    result = ESTIMATORS[name](ROWS)
    want = result.batch.advantages.values[INSIDE].std()
    assert result.metrics.values["advantage_std"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_response_without_a_trained_token_is_refused(name: str):
    rows = rollouts(Jagged.from_rows([[1], [0, 0]], np.uint8), (2,))
    with pytest.raises(ValueError, match="row 1 has no trained token"):
        ESTIMATORS[name](rows)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_rows_give_no_rows(name: str):
    rows = rollouts(MASK.take([]), ())
    assert len(ESTIMATORS[name](rows).batch) == 0
