"""Every policy loss x aggregation x correction has the hand-derived value and gradient, for any micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

from tests.workers.losses.by_hand import Batch, objective, random_batch, tokens_of
from workers.losses import POLICY_LOSSES
from workers.losses.aggregation import Counts, counts_of, reduce_loss, token_weights
from workers.losses.objective import policy_objective
from workers.settings import Aggregation, Correction, Loss

BASE = Loss(clip_low=0.2, clip_high=0.28, dual_clip=1.6, tis_cap=1.3, icepop_low=0.6, icepop_high=1.7, fixed_length=8)
CASES = list(itertools.product(POLICY_LOSSES, get_args(Aggregation), get_args(Correction)))
WHOLE = {
    "bare": {},
    "with a sequence mask, KL and entropy": {
        "sequence_low": 0.8,
        "sequence_high": 1.25,
        "kl_coefficient": 0.3,
        "entropy_coefficient": 0.05,
    },
}


def settings(policy: str, aggregation: str, correction: str, **more: object) -> Loss:
    return msgspec.structs.replace(BASE, policy=policy, aggregation=aggregation, correction=correction, **more)


def computed(parts: Sequence[Batch], loss: Loss) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradients of a batch in several micro-batches, each with the counts of the whole batch."""
    counts = sum((counts_of(part.mask_column) for part in parts), Counts(0, 0))
    total, by_log_probs, by_entropies = 0.0, [], []
    for part in parts:
        tokens = tokens_of(part)
        assert tokens.entropies is not None
        composed = policy_objective(POLICY_LOSSES[loss.policy], tokens, loss)
        weights = torch.from_numpy(token_weights(part.mask_column, counts, loss).values.copy())
        reduced = reduce_loss(composed.loss, weights)
        leaves = (tokens.log_probs, tokens.entropies)
        gradients = torch.autograd.grad(reduced, leaves, allow_unused=True, materialize_grads=True)
        total += reduced.item()
        by_log_probs.append(gradients[0].numpy())
        by_entropies.append(gradients[1].numpy())
    return total, np.concatenate(by_log_probs), np.concatenate(by_entropies)


def cut(batch: Batch, *ends: int) -> list[Batch]:
    return [batch.rows(start, stop) for start, stop in itertools.pairwise((0, *ends, len(batch.mask)))]


@pytest.mark.parametrize("more", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize(("policy", "aggregation", "correction"), CASES)
def test_value_and_gradient_are_those_worked_out_by_hand(
    policy: str, aggregation: str, correction: str, more: dict[str, float]
):
    for seed, estimator in enumerate(("k1", "k2", "k3")):
        loss, batch = settings(policy, aggregation, correction, kl_estimator=estimator, **more), random_batch(seed)
        want, (value, by_log_probs, by_entropies) = objective(batch, loss), computed([batch], loss)
        assert value == pytest.approx(want.loss, abs=1e-10)
        np.testing.assert_allclose(by_log_probs, want.by_log_probs, atol=1e-10)
        np.testing.assert_allclose(by_entropies, want.by_entropies, atol=1e-10)


@pytest.mark.parametrize(("policy", "aggregation", "correction"), CASES)
def test_neither_micro_batches_nor_ranks_change_the_loss_or_its_gradient(
    policy: str, aggregation: str, correction: str
):
    loss = settings(policy, aggregation, correction, **WHOLE["with a sequence mask, KL and entropy"])
    batch = random_batch(7)
    want = computed([batch], loss)
    cuts = {"two": [3], "four": [1, 2, 5], "uneven ranks": [6], "an empty rank": [7], "each row alone": range(1, 7)}
    for name, ends in cuts.items():
        for got, whole in zip(computed(cut(batch, *ends), loss), want, strict=True):
            np.testing.assert_allclose(got, whole, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_the_ratio_may_be_taken_to_mu(policy: str):
    for seed in range(3):
        loss, batch = settings(policy, "token-mean", "none", old="mu"), random_batch(seed)
        want, (value, by_log_probs, _) = objective(batch, loss), computed([batch], loss)
        assert value == pytest.approx(want.loss, abs=1e-10)
        np.testing.assert_allclose(by_log_probs, want.by_log_probs, atol=1e-10)


@pytest.mark.parametrize("policy", POLICY_LOSSES)
def test_a_batch_without_a_trained_token_has_loss_0_and_no_gradient(policy: str):
    batch = random_batch(0).rows(4, 5)
    value, by_log_probs, by_entropies = computed([batch], settings(policy, "token-mean", "tis", **WHOLE["bare"]))
    assert value == 0
    assert not by_log_probs.any()
    assert not by_entropies.any()


def test_a_part_without_its_input_is_an_error_that_says_which():
    tokens, ppo = tokens_of(random_batch(0)), POLICY_LOSSES["ppo"]
    bare = type(tokens)(
        tokens.log_probs, tokens.old_log_probs, tokens.rollout_log_probs, tokens.advantages, tokens.mask, tokens.lengths
    )
    with pytest.raises(ValueError, match=r"kl_coefficient = 0\.1 needs the reference's log-probs"):
        policy_objective(ppo, bare, Loss(kl_coefficient=0.1))
    with pytest.raises(ValueError, match=r"entropy_coefficient = 0\.1 needs entropies"):
        policy_objective(ppo, bare, Loss(entropy_coefficient=0.1))
