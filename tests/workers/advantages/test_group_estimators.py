"""Group-relative advantages: GRPO, Dr. GRPO, RLOO, REINFORCE++ with a baseline, DAPO."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from protocols.data.columns import take
from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, Scores
from protocols.stage import Measured
from tests.workers.advantages.batches import GROUPS, MASK, reference, rollouts, scores
from workers.advantages.dapo import dapo, overlong_penalty, trainable_groups
from workers.advantages.dr_grpo import dr_grpo
from workers.advantages.grpo import group_relative, grpo
from workers.advantages.reinforce_pp import reinforce_pp_baseline
from workers.advantages.rewards import rewards_to_go, token_rewards
from workers.advantages.rloo import rloo
from workers.advantages.whitening import whiten

Estimator = Callable[[Scores], Measured[Experience]]

ROWS = rollouts()
ANCHOR = reference(ROWS)
NUMBERS = [1.0, 2.0, 6.0, 0.5, -0.5, 0.0, 4.0]

ESTIMATORS: dict[str, Estimator] = {
    "grpo": lambda s: grpo(ROWS, ANCHOR, s),
    "dr_grpo": lambda s: dr_grpo(ROWS, s),
    "rloo": lambda s: rloo(ROWS, ANCHOR, s, kl_coefficient=0.0),
    "dapo": lambda s: dapo(ROWS, s),
}


def per_row(result: Measured[Experience]) -> list[float]:
    """The advantage of each row, which must be the same for all of its trained tokens."""
    rows = []
    for advantages, mask in zip(result.batch.advantages, MASK, strict=True):
        assert len(set(advantages[mask != 0].tolist())) == 1
        assert not advantages[mask == 0].any()
        rows.append(float(advantages[mask != 0][0]))
    return rows


def in_groups(numbers: list[float]) -> list[list[float]]:
    parts = np.split(np.array(numbers), np.cumsum(GROUPS)[:-1])
    return [part.tolist() for part in parts]


# --- computed by hand


def test_grpo_is_the_distance_from_the_mean_in_deviations():
    first, second, single = in_groups(per_row(grpo(ROWS, ANCHOR, scores(ROWS, NUMBERS))))
    np.testing.assert_allclose(first, (np.array([1, 2, 6]) - 3) / (np.sqrt(7) + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(second, [0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6), 0], rtol=1e-6)
    assert single == pytest.approx([4.0], rel=1e-5)  # mean 0, deviation 1


def test_grpos_advantage_needs_no_reference():
    bare, whole = group_relative(ROWS, scores(ROWS, NUMBERS)), grpo(ROWS, ANCHOR, scores(ROWS, NUMBERS))
    assert bare.batch.advantages == whole.batch.advantages
    assert bare.metrics.values == {k: v for k, v in whole.metrics.values.items() if k != "kl"}


def test_dr_grpo_leaves_the_deviation_out():
    assert per_row(dr_grpo(ROWS, scores(ROWS, NUMBERS))) == pytest.approx([-2, -1, 3, 0.5, -0.5, 0, 4])


def test_rloo_compares_with_the_others():
    got = per_row(rloo(ROWS, ANCHOR, scores(ROWS, NUMBERS), kl_coefficient=0.0))
    assert got == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0.75, -0.75, 0, 4])


def test_rloos_reward_is_the_responses_less_the_penalty_of_all_its_tokens():
    got = in_groups(per_row(rloo(ROWS, ANCHOR, scores(ROWS, NUMBERS), kl_coefficient=0.3, kl_estimator="k3")))
    d = (ANCHOR.log_probs.values - ROWS.log_probs.values).astype(np.float64)
    penalties = [float(row[m != 0].sum()) for row, m in zip(MASK.with_values(np.exp(d) - d - 1), MASK, strict=True)]
    totals = in_groups([s - 0.3 * penalty for s, penalty in zip(NUMBERS, penalties, strict=True)])
    for mine, group in zip(got, totals, strict=True):
        others = [np.mean(group[:i] + group[i + 1 :]) if len(group) > 1 else 0.0 for i in range(len(group))]
        np.testing.assert_allclose(mine, np.array(group) - others, atol=1e-5)


def test_reinforce_pp_with_a_baseline_whitens_the_returns_of_relative_scores():
    got = reinforce_pp_baseline(ROWS, ANCHOR, scores(ROWS, NUMBERS), gamma=0.9, kl_coefficient=0.2)
    relative = np.array([-2, -1, 3, 0.5, -0.5, 0, 4])
    earned = token_rewards(ROWS, ANCHOR, relative, 0.2, "k1")
    returns = rewards_to_go(earned.rewards, MASK, 0.9)
    np.testing.assert_allclose(got.batch.advantages.values, whiten(returns, MASK.values), atol=1e-6)
    assert got.metrics.values["advantage_std"] == pytest.approx(returns[MASK.values != 0].std())


# --- identities


def test_both_forms_of_rloo_agree():
    """k / (k - 1) (s - mean) equals s minus the mean of the other scores."""
    group = np.random.default_rng(0).normal(size=8)
    left_out = [s - np.delete(group, i).mean() for i, s in enumerate(group)]
    mask = Jagged.from_rows([[1]] * 8, np.uint8)
    rows = rollouts(mask, (8,))
    got = rloo(rows, reference(rows), scores(rows, group.tolist()), kl_coefficient=0.0).batch.advantages.values
    np.testing.assert_allclose(got, left_out, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_group_of_equal_scores_teaches_nothing(name: str):
    got = in_groups(per_row(ESTIMATORS[name](scores(ROWS, [0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 2.0]))))
    assert got[:2] == [[0, 0, 0], [0, 0, 0]]  # exactly, although neither score is a binary fraction


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_constant_added_to_a_groups_scores_changes_nothing(name: str):
    raised = [s + (2.0 if i < 3 else 0.0) for i, s in enumerate(NUMBERS)]
    before, after = (per_row(ESTIMATORS[name](scores(ROWS, n))) for n in (NUMBERS, raised))
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_of_a_group_add_up_to_0(name: str):
    for group in in_groups(per_row(ESTIMATORS[name](scores(ROWS, NUMBERS))))[:2]:
        assert sum(group) == pytest.approx(0, abs=1e-5)


def test_groups_are_found_wherever_their_rows_stand():
    order = np.random.default_rng(1).permutation(len(ROWS))
    numbers = scores(ROWS, NUMBERS)
    straight = grpo(ROWS, ANCHOR, numbers).batch
    assert grpo(take(ROWS, order), take(ANCHOR, order), take(numbers, order)).batch == take(straight, order)


# --- DAPO


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (16, 0), (17, -0.125), (20, -0.5), (24, -1)]
)  # limit 24, buffer 8
def test_overlong_responses_pay_linearly_inside_the_buffer(length: int, penalty: float):
    assert overlong_penalty(np.array([length]), 24, 8)[0] == penalty
    assert overlong_penalty(np.array([length]), 24, 8, factor=2.0)[0] == 2 * penalty


@pytest.mark.parametrize(("limit", "buffer"), [(0, 4), (4, 5), (4, -1)])
def test_a_buffer_fits_under_its_limit(limit: float, buffer: float):
    with pytest.raises(ValueError, match=f"overlong buffer of {buffer} tokens"):
        overlong_penalty(np.array([3]), limit, buffer)


def test_dapo_is_grpo_of_the_shaped_scores():
    penalties = [min(-(n - 4) / 2, 0.0) for n in MASK.lengths.tolist()]  # of all response tokens, including masked ones
    shaped = [s + penalty for s, penalty in zip(NUMBERS, penalties, strict=True)]
    got = dapo(ROWS, scores(ROWS, NUMBERS), overlong_limit=6.0, overlong_buffer=2.0)
    assert got.batch == group_relative(ROWS, scores(ROWS, shaped)).batch
    assert got.metrics.values["overlong_penalty"] == pytest.approx(np.mean(penalties))
    assert got.metrics.values["flat_groups"] == pytest.approx(1 / 7)
    assert dapo(ROWS, scores(ROWS, NUMBERS)).batch == group_relative(ROWS, scores(ROWS, NUMBERS)).batch


def test_dynamic_sampling_keeps_prompts_whose_scores_differ():
    kept = trainable_groups(scores(ROWS, [1, 1, 1, 0, 1, 0, 1]))
    assert kept.tolist() == [False] * 3 + [True] * 3 + [False]
