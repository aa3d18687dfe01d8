"""KL terms and entropies: their estimates, and the gradients of these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.advantages import kl
from workers.losses.regularizers import kl_loss, measured_entropies, token_entropies
from workers.settings import KlEstimator

ESTIMATORS: list[KlEstimator] = ["k1", "k2", "k3"]


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """A policy's logits, with gradient, and a reference's log-probs, over 8 tokens."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=8), requires_grad=True)
    return logits, torch.log_softmax(torch.tensor(rng.normal(size=8)), -1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


@given(st.lists(st.tuples(st.floats(-15, 0), st.floats(-15, 0)), min_size=1), st.sampled_from(ESTIMATORS))
def test_the_loss_and_the_reward_estimate_by_the_same_formula(pairs: list[tuple[float, float]], name: KlEstimator):
    policy, reference = (np.array(column) for column in zip(*pairs, strict=True))
    got = kl_loss(torch.from_numpy(policy), torch.from_numpy(reference), name)
    np.testing.assert_allclose(got, kl.kl_terms(policy, reference, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_have_the_divergence_as_their_mean(name: KlEstimator):
    logits, reference = distributions()
    log_p = torch.log_softmax(logits.detach(), -1)
    mean = (log_p.exp() * kl_loss(log_p, reference, name)).sum()
    assert mean.item() == pytest.approx(divergence(log_p, reference).item(), abs=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_the_mean_the_gradient_is_the_divergences_the_other_ways_or_none(name: KlEstimator):
    """Tokens are sampled from p, so each token's gradient is weighted by p, which is not differentiated."""
    logits, reference = distributions()
    log_p = torch.log_softmax(logits, -1)
    term = (log_p.detach().exp() * kl_loss(log_p, reference, name)).sum()
    (got,) = torch.autograd.grad(term, logits, retain_graph=True)
    towards = {"k1": 0.0 * logits.sum(), "k2": divergence(log_p, reference), "k3": divergence(reference, log_p)}
    (want,) = torch.autograd.grad(towards[name], logits)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_terms_have_their_numeric_gradient_and_stay_finite(name: KlEstimator):
    log_probs = torch.tensor([-1.0, -3.0, -0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -0.1, -0.2001], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, reference, name), (log_probs,))
    far = torch.tensor([-800.0, -0.1])
    assert torch.isfinite(kl_loss(far, far.flip(0), name)).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_entropies_are_those_of_the_tempered_distribution(temperature: float):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    want = torch.distributions.Categorical(logits=logits / temperature).entropy()
    torch.testing.assert_close(token_entropies(logits, temperature), want)
    assert torch.autograd.gradcheck(lambda x: token_entropies(x, temperature), (logits,))


def test_entropy_is_highest_where_all_tokens_are_alike_and_0_where_one_is_certain():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(token_entropies(logits), [np.log(4), 0.0], atol=1e-6)


def test_measured_entropies_are_the_same_numbers_without_a_gradient():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    truncated = logits.detach().clone()
    truncated[3, :30] = -torch.inf
    tokens = torch.full((9,), 35)
    for some in (logits, truncated):
        log_probs = torch.log_softmax(some, -1)[:, 35]
        measured = measured_entropies(some, tokens, log_probs)
        torch.testing.assert_close(measured, token_entropies(some).detach(), atol=2e-6, rtol=0)
        assert not measured.requires_grad
    assert measured_entropies(logits[:0], tokens[:0], logits[:0, 0]).shape == (0,)
