"""The KL estimators agree with the exact divergence, and the adaptive coefficient follows its target."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.advantages.kl import AdaptiveKl, kl_terms

STATE = AdaptiveKl(coefficient=0.1, target=0.02, horizon=1000)


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


# --- the coefficient


@pytest.mark.parametrize(
    ("kl", "error"),
    [(0.02, 0.0), (0.022, 0.1), (0.018, -0.1), (0.5, 0.2), (0.0, -0.2), (-0.3, -0.2)],  # a k1 mean may be negative
)
def test_an_adaptive_coefficient_moves_by_the_bounded_relative_error(kl: float, error: float):
    after = STATE.after(kl, samples=250)
    assert after.coefficient == pytest.approx(0.1 * (1 + error * 0.25))
    assert (after.target, after.horizon) == (STATE.target, STATE.horizon)


@given(st.floats(0.001, 10), st.floats(0.001, 1), st.lists(st.floats(-1, 1e6), max_size=50))
def test_an_adaptive_coefficient_stays_positive(coefficient: float, target: float, measured: list[float]):
    state = AdaptiveKl(coefficient, target, horizon=1000)
    for kl in measured:
        state = state.after(kl, samples=1000)
        assert 0 < state.coefficient < math.inf


def test_it_converges_to_where_the_kl_is_at_its_target():
    """A policy whose KL is inversely proportional to the coefficient: 0.02 at 0.05."""
    state = STATE
    for _ in range(400):
        state = state.after(0.001 / state.coefficient, samples=250)
    assert state.coefficient == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_no_number_is_refused(kl: float):
    with pytest.raises(ValueError, match=f"measured KL is {kl}"):
        STATE.after(kl, samples=1)


def test_a_step_that_could_turn_the_sign_is_refused_with_the_horizon_it_needs():
    with pytest.raises(ValueError, match=r"5000 samples a step at a horizon of 1000.*more than 1000 samples"):
        STATE.after(0.0, samples=5000)


@pytest.mark.parametrize("name", ["coefficient", "target", "horizon"])
def test_an_adaptive_coefficient_needs_numbers_above_0(name: str):
    with pytest.raises(ValueError, match=f"{name} = 0: "):
        msgspec.structs.replace(STATE, **{name: 0})
