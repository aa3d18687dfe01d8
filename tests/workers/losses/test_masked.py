"""The numbers of masked tokens change nothing in any loss, gradient or metric, whatever they are."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workers.losses.by_hand import random_batch, tokens_of
from workers.losses import POLICY_LOSSES
from workers.losses.aggregation import counts_of, reduce_loss, token_weights
from workers.losses.metrics import loss_metrics
from workers.losses.objective import policy_objective
from workers.losses.regularizers import token_entropies
from workers.losses.tokens import Tokens, trained
from workers.losses.value import value_loss
from workers.settings import Correction, KlEstimator, Loss

ODD = [-math.inf, math.inf, math.nan]
BATCH = random_batch(11)


def with_masked(number: float) -> Tokens:
    """A batch in which every number of a masked token is this one."""
    tokens = tokens_of(BATCH)
    columns = {f.name: getattr(tokens, f.name) for f in fields(tokens) if f.name not in ("mask", "lengths")}
    odd = {n: torch.where(tokens.mask, column.detach(), number) for n, column in columns.items()}
    odd |= {name: odd[name].requires_grad_() for name in ("log_probs", "entropies")}
    return replace(tokens, **odd)


def taken(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """The loss, its gradients by log-probs and entropies, and the metrics."""
    objective = policy_objective(POLICY_LOSSES[loss.policy], tokens, loss)
    weights = token_weights(BATCH.mask_column, counts_of(BATCH.mask_column), loss)
    total = reduce_loss(objective.loss, torch.from_numpy(np.array(weights.values)))
    assert tokens.entropies is not None
    by_log_probs, by_entropies = torch.autograd.grad(total, (tokens.log_probs, tokens.entropies))
    return total.detach(), by_log_probs, by_entropies, loss_metrics(tokens, objective, loss)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("policy", POLICY_LOSSES)
def test_a_policy_loss_with_any_parts_ignores_them(policy: str, odd: float):
    for correction in get_args(Correction):
        for estimator in get_args(KlEstimator):
            loss = Loss(
                policy=policy, correction=correction, sequence_high=3.0, kl_coefficient=0.1, kl_estimator=estimator,
                entropy_coefficient=0.1, aggregation="sequence-mean-token-mean",
            )  # fmt: skip
            *ours, measured = taken(with_masked(odd), loss)
            *theirs, expected = taken(with_masked(-1.0), loss)
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
            assert measured == expected
            assert math.isfinite(float(ours[0]))


@pytest.mark.parametrize("odd", ODD)
def test_a_value_loss_ignores_them(odd: float):
    mask = torch.tensor([1, 0, 1])
    values = torch.tensor([0.5, odd, 1.0], requires_grad=True)
    others = torch.tensor([0.1, odd, 2.0])
    per_token = value_loss(trained(values, mask), trained(others, mask), trained(others, mask), 0.2)
    (gradient,) = torch.autograd.grad(reduce_loss(per_token, mask), values)
    assert gradient.isfinite().all()
    assert gradient[1] == 0.0


@pytest.mark.parametrize("odd", ODD)
def test_a_sum_leaves_out_what_a_users_loss_says_of_a_token_of_weight_0(odd: float):
    assert reduce_loss(torch.tensor([1.0, odd]), torch.tensor([0.5, 0.0])) == 0.5


def test_a_token_that_can_not_be_sampled_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.3, 1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    entropy = token_entropies(logits)
    torch.testing.assert_close(entropy, token_entropies(logits[:, :2]))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    (without,) = torch.autograd.grad(token_entropies(logits[:, :2]).sum(), logits)
    torch.testing.assert_close(gradient, without)


@pytest.mark.parametrize("policy", ["ppo", "gspo"])
@pytest.mark.parametrize("log_ratio", [25.0, -25.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_whose_ratio_is_beyond_the_bound_counts_as_clipped(policy: str, log_ratio: float, advantage: float):
    """Without a dual clip the bound is all that limits a bad token's loss."""
    old = torch.zeros(1)
    mask, lengths = torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.int64)
    tokens = Tokens(old + log_ratio, old, old, torch.tensor([advantage]), mask, lengths)
    assert POLICY_LOSSES[policy](tokens, Loss(dual_clip=0.0)).clipped.all()
    assert not POLICY_LOSSES[policy](replace(tokens, advantages=old), Loss(dual_clip=0.0)).clipped.any()


@pytest.mark.parametrize("correction", get_args(Correction))
def test_a_weight_beyond_the_bound_counts_as_truncated(correction: Correction):
    old = torch.zeros(1)
    mask, lengths = torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.int64)
    tokens = Tokens(old, old, old - 25.0, old + 1.0, mask, lengths)
    objective = policy_objective(POLICY_LOSSES["ppo"], tokens, Loss(correction=correction))
    assert bool(objective.correction.truncated) == (correction != "none")
