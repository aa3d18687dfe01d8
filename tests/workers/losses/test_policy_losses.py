"""Each policy loss on policy, in each region of its clip, and at the boundaries."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from tests.workers.losses.by_hand import policy_term, random_batch, tokens_of
from workers.losses import POLICY_LOSSES, PolicyLoss, policy_loss_named
from workers.losses.objective import policy_objective
from workers.losses.policy import cispo, gspo, ppo, reinforce
from workers.losses.tokens import Surrogate, Tokens
from workers.settings import Correction, Loss

LOSS = Loss(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
seeds = st.integers(0, 2**32 - 1)
clips = st.builds(
    Loss, clip_low=st.floats(0.05, 0.5), clip_high=st.floats(0.05, 0.5), dual_clip=st.sampled_from([0.0, 1.6, 3.0])
)


def on_policy(seed: int) -> Tokens:
    """theta = prox = mu."""
    tokens = tokens_of(random_batch(seed))
    return replace(tokens, old_log_probs=tokens.log_probs.detach(), rollout_log_probs=tokens.log_probs.detach())


def gradient_of(surrogate: torch.Tensor, tokens: Tokens) -> np.ndarray:
    """The derivative of the sum over trained tokens by each token's log-prob."""
    (gradient,) = torch.autograd.grad(surrogate[tokens.mask].sum(), tokens.log_probs)
    return gradient.numpy()


def single(ratio: float, advantage: float) -> Tokens:
    """One trained token in float64."""
    old = torch.zeros(1, dtype=torch.float64)
    return Tokens(
        log_probs=torch.tensor([np.log(ratio)], dtype=torch.float64, requires_grad=True),
        old_log_probs=old,
        rollout_log_probs=old,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        mask=torch.ones(1, dtype=torch.bool),
        lengths=torch.ones(1, dtype=torch.int64),
    )


# --- identities


@pytest.mark.parametrize("policy", POLICY_LOSSES)
@pytest.mark.parametrize("correction", get_args(Correction))
def test_on_policy_every_loss_under_every_correction_has_reinforces_gradient(policy: str, correction: Correction):
    for seed in range(5):
        tokens = on_policy(seed)
        loss = Loss(policy=policy, correction=correction, sequence_low=0.5, sequence_high=2.0)
        got = gradient_of(policy_objective(POLICY_LOSSES[policy], tokens, loss).loss, tokens)
        np.testing.assert_allclose(got, -(tokens.advantages * tokens.mask).numpy(), atol=1e-12)  # of -A log theta


@given(seeds, clips)
def test_decoupled_ppo_with_prox_at_mu_is_ppo(seed: int, loss: Loss):
    tokens = tokens_of(random_batch(seed))
    tokens = replace(tokens, rollout_log_probs=tokens.old_log_probs)
    decoupled = policy_objective(ppo, tokens, structs.replace(loss, correction="importance"))
    plain = policy_objective(ppo, tokens, loss)
    assert torch.equal(decoupled.loss, plain.loss)
    assert np.array_equal(gradient_of(decoupled.loss, tokens), gradient_of(plain.loss, tokens))


@given(seeds, clips)
def test_gspo_with_one_token_a_row_is_ppo(seed: int, loss: Loss):
    tokens = tokens_of(random_batch(seed, lengths=(1,) * 12))
    for ours, theirs in zip(gspo(tokens, loss), ppo(tokens, loss), strict=True):
        np.testing.assert_allclose(ours.detach()[tokens.mask], theirs.detach()[tokens.mask], atol=1e-12)
    np.testing.assert_allclose(
        gradient_of(gspo(tokens, loss).loss, tokens), gradient_of(ppo(tokens, loss).loss, tokens), atol=1e-12
    )


@given(seeds)
def test_gspo_is_the_sequence_objective_where_a_row_has_one_advantage(seed: int):
    """The paper's objective: -min(s A, clip(s) A) per row, differentiated through the mean of its log-ratios."""
    loss, tokens = Loss(clip_low=0.05, clip_high=0.08, dual_clip=0.0), tokens_of(random_batch(seed, lengths=(2, 5, 3)))
    advantages = torch.from_numpy(np.random.default_rng(seed).normal(size=3))
    tokens = replace(tokens, advantages=torch.repeat_interleave(advantages, tokens.lengths))
    rows = []
    for row, part in enumerate(torch.arange(10).split(tokens.lengths.tolist())):
        kept = part[tokens.mask[part]]
        if not len(kept):
            continue
        s = torch.exp((tokens.log_probs[kept] - tokens.old_log_probs[kept]).mean())
        value = torch.maximum(-s * advantages[row], -s.clamp(0.95, 1.08) * advantages[row])
        rows.append(len(kept) * value)  # a sum over tokens, as gradient_of takes it
    if not rows:
        return
    (want,) = torch.autograd.grad(torch.stack(rows).sum(), tokens.log_probs)
    np.testing.assert_allclose(gradient_of(gspo(tokens, loss).loss, tokens), want, atol=1e-12)


# --- closed forms


@pytest.mark.parametrize("policy", POLICY_LOSSES)
@given(seed=seeds, clips=clips)
def test_value_gradient_and_clip_are_the_closed_form_in_every_region(policy: str, seed: int, clips: Loss):
    loss = structs.replace(clips, policy=policy)
    batch = random_batch(seed, lengths=(4, 3, 5), moved=0.8)
    tokens = tokens_of(batch)
    surrogate = POLICY_LOSSES[policy](tokens, loss)
    gradient = gradient_of(surrogate.loss, tokens)
    flat = [(row, t) for row, mask in enumerate(batch.mask) for t in range(len(mask))]
    for i, (row, t) in enumerate(flat):
        if batch.mask[row][t]:
            value, slope, clipped = policy_term(batch, row, t, loss)
            assert surrogate.loss[i].item() == pytest.approx(value, abs=1e-10)
            assert gradient[i] == pytest.approx(slope, abs=1e-10)
            assert bool(surrogate.clipped[i]) == clipped


@pytest.mark.parametrize("policy", [ppo, gspo])
@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "learns"),
    [
        (1.5, 2.0, -2.56, False),  # clipped above: 1.28 x 2
        (1.2, 2.0, -2.4, True),
        (0.5, 2.0, -1.0, True),  # a good token that has become too rare is still pulled back
        (0.5, -2.0, 1.6, False),  # clipped below: 0.8 x 2
        (1.5, -2.0, 3.0, True),
        (5.0, -2.0, 6.0, False),  # the dual clip: 3 x 2, not 5 x 2
    ],
)
def test_clip_and_dual_clip_by_numbers(policy: PolicyLoss, ratio: float, advantage: float, value: float, learns: bool):
    tokens = single(ratio, advantage)
    surrogate = policy(tokens, LOSS)
    assert surrogate.loss.item() == pytest.approx(value)
    assert (gradient_of(surrogate.loss, tokens)[0] != 0) == learns
    assert bool(surrogate.clipped[0]) != learns


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.8), (1.1, 1.1), (4.0, 1.28)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_every_token_goes_on_learning(ratio: float, weight: float, advantage: float):
    tokens = single(ratio, advantage)
    surrogate = cispo(tokens, LOSS)
    assert gradient_of(surrogate.loss, tokens)[0] == pytest.approx(-weight * advantage)
    assert bool(surrogate.clipped[0]) == (ratio != weight)


def test_without_dual_clip_the_loss_grows_with_the_ratio():
    assert ppo(single(50.0, -1.0), Loss(dual_clip=0.0)).loss.item() == pytest.approx(50)


@pytest.mark.parametrize("policy", POLICY_LOSSES)
def test_log_ratios_of_hundreds_stay_finite(policy: str):
    tokens = replace(
        single(1.0, 1.0),
        log_probs=torch.tensor([-1.0, -900.0], requires_grad=True),
        old_log_probs=torch.tensor([-900.0, -1.0]),
        rollout_log_probs=torch.tensor([-900.0, -1.0]),
        advantages=torch.tensor([-1.0, -1.0]),
        mask=torch.ones(2, dtype=torch.bool),
        lengths=torch.tensor([1, 1]),
    )
    composed = policy_objective(POLICY_LOSSES[policy], tokens, Loss(dual_clip=0.0, correction="importance"))
    assert torch.isfinite(composed.loss).all()
    assert np.isfinite(gradient_of(composed.loss, tokens)).all()


@pytest.mark.parametrize("policy", [ppo, reinforce])
def test_the_gradient_is_the_numeric_one(policy: PolicyLoss):
    """Except for cispo and gspo, whose gradients are by design not those of their values."""
    tokens = tokens_of(random_batch(3))

    def value(log_probs: torch.Tensor) -> torch.Tensor:
        return policy(replace(tokens, log_probs=log_probs), LOSS).loss[tokens.mask]

    assert torch.autograd.gradcheck(value, (tokens.log_probs,))


# --- names


def mine(tokens: Tokens, loss: Loss) -> Surrogate:
    """A user's loss."""
    return Surrogate(loss.clip_low * tokens.log_probs, tokens.mask)


def test_a_loss_is_found_by_name_or_by_module_and_function():
    assert policy_loss_named("gspo") is gspo
    assert policy_loss_named(f"{__name__}:mine").__name__ == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pppo", r"'pppo' is none of ppo, gspo, cispo, reinforce and no package\.module:function"),
        ("nowhere.at_all:f", "importing nowhere.at_all raised ModuleNotFoundError"),
        (
            "workers.losses.policy:pppo",
            r"loss\.policy 'workers\.losses\.policy:pppo': module .* \(.*losses/policy\.py\) has no function 'pppo'",
        ),
    ],
)
def test_a_loss_that_is_not_there_is_refused(name: str, message: str):
    with pytest.raises(LookupError, match=message):
        policy_loss_named(name)
