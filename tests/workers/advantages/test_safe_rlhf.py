"""Safe-RLHF: how lambda weighs reward and cost advantages, and how it follows the mean cost."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.messages import Costs, Experience, Scores
from protocols.stage import Stateful
from tests.workers.advantages.batches import MASK, reference, rollouts, scores, values
from workers.advantages.gae import gae
from workers.advantages.safe_rlhf import Multiplier, safe_rlhf
from workers.advantages.whitening import whiten

ROWS = rollouts()
ANCHOR, VALUES, COST_VALUES = reference(ROWS), values(ROWS), values(ROWS, seed=40)
SCORES = scores(ROWS)
NUMBERS = {"limit": 0.0, "rate": 0.1, "most": 5.0, "window": 128}


def costs(numbers: Any) -> Costs:
    return Costs(sample_ids=ROWS.sample_ids, costs=np.array(numbers, np.float32))


COSTS = costs(np.random.default_rng(9).normal(size=len(ROWS)))


def estimate(of: Costs = COSTS, scored: Scores = SCORES, **numbers: Any) -> Stateful[Experience, Multiplier]:
    return safe_rlhf(ROWS, ANCHOR, VALUES, COST_VALUES, scored, of, **numbers)


# --- the advantage


@pytest.mark.parametrize("whiten_advantages", [True, False])
def test_with_lambda_0_it_is_ppo_on_the_reward(whiten_advantages: bool):
    numbers = {"kl_coefficient": 0.3, "gae_lambda": 0.8, "gamma": 0.9, "whiten_advantages": whiten_advantages}
    safe = estimate(state=Multiplier(0.0), **numbers)
    plain = gae(ROWS, ANCHOR, VALUES, SCORES, **numbers)
    nothing = MASK.with_values(np.zeros(len(MASK.values), np.float32))
    assert msgspec.structs.replace(safe.batch, cost_returns=nothing, cost_values=nothing) == plain.batch
    assert safe.state.value == 0.0
    assert safe.metrics.values["kl"] == plain.metrics.values["kl"]


def test_the_cost_critic_s_targets_are_those_of_ppo_on_the_cost_with_the_penalty_added():
    safe = estimate(kl_coefficient=0.3)
    as_reward = Scores(sample_ids=ROWS.sample_ids, scores=COSTS.costs)
    alone = gae(ROWS, ANCHOR, COST_VALUES, as_reward, kl_coefficient=-0.3).batch
    assert safe.batch.cost_returns == alone.returns
    assert safe.batch.cost_values == COST_VALUES.values
    assert safe.batch.values == VALUES.values


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_it_is_the_weighted_mean_of_the_two_advantages(weight: float):
    numbers = {"kl_coefficient": 0.2, "whiten_advantages": False}
    reward = gae(ROWS, ANCHOR, VALUES, SCORES, **numbers).batch.advantages.values.astype(np.float64)
    as_reward = Scores(sample_ids=ROWS.sample_ids, scores=COSTS.costs)
    cost = gae(ROWS, ANCHOR, COST_VALUES, as_reward, **{**numbers, "kl_coefficient": -0.2})
    wanted = (reward - weight * cost.batch.advantages.values.astype(np.float64)) / (1 + weight)
    got = estimate(multiplier=weight, multiplier_rate=0.0, **numbers).batch.advantages.values
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    white = estimate(multiplier=weight, multiplier_rate=0.0, kl_coefficient=0.2).batch.advantages.values
    np.testing.assert_allclose(white, whiten(wanted, MASK.values), rtol=1e-4, atol=1e-5)


def test_rewards_and_costs_beyond_50_count_as_50():
    far, near = (estimate(costs([-x] * 7), scores(ROWS, [x] * 7), kl_coefficient=0.0, cost_limit=-x) for x in (9e3, 50))
    assert far.batch == near.batch


# --- the multiplier lambda


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(0.01, 4.9), st.floats(-2, 2))
def test_lambda_rises_while_the_mean_cost_is_above_its_limit_and_falls_while_it_is_below(
    seen: list[float], start: float, limit: float
):
    after = Multiplier(start).after(np.array(seen), **{**NUMBERS, "limit": limit})
    excess = np.mean(seen) - limit
    assert (after.value > start) == (excess > 1e-9) or abs(excess) < 1e-9
    assert after.value == pytest.approx(min(start * np.exp(0.1 * start * excess), 5.0))


def test_lambda_stays_under_its_bound_and_comes_back_from_it():
    at_bound = Multiplier(4.9).after(np.full(9, 100.0), **NUMBERS)
    assert at_bound.value == pytest.approx(5.0)
    assert at_bound.after(np.full(9, -300.0), **NUMBERS).value < 5.0


def test_lambda_comes_back_from_an_extreme_cost():
    far = Multiplier(5.0).after(np.array([-3000.0]), **{**NUMBERS, "rate": 0.5})
    assert far.value == pytest.approx(0.05)
    assert far.after(np.full(200, 40.0), **NUMBERS).value > far.value


def test_only_the_last_samples_are_remembered():
    state = Multiplier(1.0)
    for step in range(4):
        state = state.after(np.arange(3.0) + 3 * step, **{**NUMBERS, "window": 5})
    assert state.costs == [7.0, 8.0, 9.0, 10.0, 11.0]


def test_the_state_goes_from_step_to_step_and_a_step_uses_what_its_own_costs_made_of_it():
    first = estimate(costs([1.0] * 7), multiplier=0.5)
    second = estimate(costs([1.0] * 7), multiplier=0.5, state=first.state)
    for before, step in ((0.5, first), (first.state.value, second)):
        assert step.state.value == step.metrics.values["multiplier"] == pytest.approx(before * np.exp(0.1 * before))
        assert step.metrics.values["cost_excess"] == 1.0
    assert len(second.state.costs) == 14


def test_a_state_survives_as_json_bit_for_bit():
    state = estimate().state
    assert msgspec.json.decode(msgspec.json.encode(state), type=Multiplier) == state


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"multiplier": 6.0}, "multiplier = 6: want 0 to multiplier_most = 5"),
        ({"multiplier": -1.0}, "multiplier = -1: want 0"),
        ({"multiplier_most": 0.0}, "multiplier_most = 0, which is above 0"),
        ({"multiplier_rate": float("nan")}, "multiplier_rate = nan"),
        ({"cost_window": 0}, "cost_window = 0"),
        ({"cost_window": 2.5}, "cost_window = 2.5: want a whole number"),
    ],
)
def test_numbers_that_have_no_meaning_are_refused(numbers: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        estimate(**numbers)


def test_a_cost_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the multiplier can't follow it"):
        Multiplier(1.0).after(np.array([np.inf]), **NUMBERS)
