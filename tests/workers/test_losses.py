"""Losses agree, value and gradient, with closed forms worked out by hand in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocols.columns import Jagged
from workers.losses import clipped_tokens, ppo, ratio_of, reduce_loss, token_weights, value_loss
from workers.settings import Aggregation, Loss

AGGREGATIONS: list[Aggregation] = ["token-mean", "sequence-mean-token-sum", "sequence-mean-token-mean"]
LOSS = Loss(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
seeds = st.integers(0, 2**32 - 1)
clips = st.builds(
    Loss, clip_low=st.floats(0.05, 0.5), clip_high=st.floats(0.05, 0.5), dual_clip=st.sampled_from([0.0, 1.6, 3.0])
)
masks = st.lists(st.lists(st.integers(0, 1), max_size=7), min_size=1, max_size=8).map(
    lambda rows: Jagged.from_rows(rows, np.uint8)
)

Float64 = npt.NDArray[np.float64]


def drawn(seed: int, *scales: float, n: int = 40) -> list[torch.Tensor]:
    """Normal float64 tensors [n], one for each scale."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(0, scale, n)) for scale in scales]


def value_and_gradient(loss: torch.Tensor, at: torch.Tensor) -> tuple[Float64, Float64]:
    (gradient,) = torch.autograd.grad(loss.sum(), at)
    return loss.detach().numpy(), gradient.numpy()


def ppo_by_hand(ratio: float, advantage: float, loss: Loss) -> tuple[float, float]:
    """One token's loss and its derivative by its log-prob, region by region."""
    if advantage >= 0:
        flat = 1 + loss.clip_high if ratio > 1 + loss.clip_high else None
    elif ratio < 1 - loss.clip_low:
        flat = 1 - loss.clip_low
    else:
        flat = loss.dual_clip if loss.dual_clip and ratio > loss.dual_clip else None
    return (-ratio * advantage, -ratio * advantage) if flat is None else (-flat * advantage, 0.0)


@given(seeds, clips)
def test_on_policy_the_gradient_is_that_of_reinforce(seed: int, loss: Loss):
    log_probs, advantages = drawn(seed, 2.0, 1.0)
    log_probs.requires_grad_()
    _, gradient = value_and_gradient(ppo(log_probs, log_probs.detach(), advantages, loss), log_probs)
    np.testing.assert_allclose(gradient, -advantages.numpy(), atol=1e-12)  # of -A log pi


@given(seeds, clips)
def test_ppo_is_its_closed_form_in_every_region(seed: int, loss: Loss):
    log_probs, step, advantages = drawn(seed, 2.0, 0.8, 1.0)
    proximal = log_probs - step
    log_probs.requires_grad_()
    value, gradient = value_and_gradient(ppo(log_probs, proximal, advantages, loss), log_probs)
    by_hand = [ppo_by_hand(np.exp(s), a, loss) for s, a in zip(step.tolist(), advantages.tolist(), strict=True)]
    np.testing.assert_allclose(value, [v for v, _ in by_hand], atol=1e-6)
    np.testing.assert_allclose(gradient, [g for _, g in by_hand], atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "learns"),
    [
        (1.5, 2.0, -2.56, False),  # clipped above: 1.28 x 2
        (1.2, 2.0, -2.4, True),
        (0.5, 2.0, -1.0, True),  # a good token grown too rare is still pulled back
        (0.5, -2.0, 1.6, False),  # clipped below: 0.8 x 2
        (1.5, -2.0, 3.0, True),
        (5.0, -2.0, 6.0, False),  # the dual clip: 3 x 2, not 5 x 2
    ],
)
def test_clip_and_dual_clip_by_hand(ratio: float, advantage: float, value: float, learns: bool):
    log_probs = torch.tensor([np.log(ratio)], requires_grad=True)
    loss, gradient = value_and_gradient(ppo(log_probs, torch.zeros(1), torch.tensor([advantage]), LOSS), log_probs)
    assert loss[0] == pytest.approx(value)
    assert (gradient[0] != 0) == learns


def test_without_dual_clip_the_loss_grows_with_the_ratio():
    loss = Loss(dual_clip=0.0)
    assert ppo(torch.tensor([np.log(50.0)]), torch.zeros(1), torch.tensor([-1.0]), loss).item() == pytest.approx(50)


def test_a_log_ratio_of_hundreds_stays_finite():
    ratio = ratio_of(torch.tensor([500.0, -500.0]), torch.zeros(2))
    np.testing.assert_allclose(ratio.numpy(), np.exp([20.0, -20.0]), rtol=1e-6)


@given(seeds, clips)
def test_clipped_tokens_are_the_trained_tokens_without_gradient(seed: int, loss: Loss):
    log_probs, step, advantages = drawn(seed, 2.0, 0.8, 1.0)
    mask = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, len(step)))
    proximal = log_probs - step
    log_probs.requires_grad_()
    _, gradient = value_and_gradient(ppo(log_probs, proximal, advantages, loss), log_probs)
    want = int(((gradient == 0) & (mask.numpy() != 0)).sum())
    assert int(clipped_tokens(log_probs.detach(), proximal, advantages, mask, loss)) == want


@given(seeds, st.sampled_from([0.0, 0.1, 0.5]))
def test_the_value_loss_is_its_closed_form(seed: int, clip: float):
    old, step, returns = drawn(seed, 1.0, 0.5, 1.0)
    values = (old + step).requires_grad_()
    value, gradient = value_and_gradient(value_loss(values, old, returns, clip), values)
    for i, (v, o, r) in enumerate(zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)):
        near = min(max(v, o - clip), o + clip)
        worse = clip > 0 and (near - r) ** 2 > (v - r) ** 2  # only a clip that makes things worse counts
        assert value[i] == pytest.approx(0.5 * ((near if worse else v) - r) ** 2, abs=1e-6)
        assert gradient[i] == pytest.approx(0.0 if worse else v - r, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ("token-mean", [1 / 4, 0, 1 / 4, 1 / 4, 0, 0, 1 / 4]),
        ("sequence-mean-token-sum", [1 / 2, 0, 1 / 2, 1 / 2, 0, 0, 1 / 2]),
        ("sequence-mean-token-mean", [1 / 6, 0, 1 / 6, 1 / 6, 0, 0, 1 / 2]),
    ],
)
def test_weights_by_hand_and_an_untrained_row_counts_nowhere(how: Aggregation, weights: list[float]):
    mask = Jagged.from_rows([[1, 0, 1, 1], [0, 0], [1]], np.uint8)
    got = token_weights(mask, how)
    np.testing.assert_allclose(got.values, weights, rtol=1e-6)
    assert np.array_equal(got.offsets, mask.offsets)


@given(masks, st.sampled_from(AGGREGATIONS), seeds)
def test_aggregations_are_the_means_that_their_names_say(mask: Jagged, how: Aggregation, seed: int):
    losses = mask.with_values(np.random.default_rng(seed).normal(size=len(mask.values)))
    rows = [row[m != 0] for row, m in zip(losses, mask, strict=True) if m.any()]
    want = 0.0
    if rows:
        want = {
            "token-mean": np.concatenate(rows).mean(),
            "sequence-mean-token-sum": np.mean([row.sum() for row in rows]),
            "sequence-mean-token-mean": np.mean([row.mean() for row in rows]),
        }[how]
    weights = token_weights(mask, how)
    got = reduce_loss(torch.from_numpy(losses.values.copy()), torch.from_numpy(weights.values.copy()))
    assert got.item() == pytest.approx(want, abs=1e-6)
