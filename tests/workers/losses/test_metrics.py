"""The loss metrics of a step: means over trained tokens, accumulated over micro-batches."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.workers.losses.by_hand import Batch, correction, kl_term, policy_term, random_batch, tokens_of
from workers.losses import POLICY_LOSSES
from workers.losses.metrics import STEPS, accumulate, loss_metrics, mean_metrics
from workers.losses.objective import policy_objective
from workers.settings import Loss

LOSS = Loss(
    correction="tis", tis_cap=1.2, sequence_high=1.4, kl_coefficient=0.1, entropy_coefficient=0.1, clip_high=0.28
)


def measured(batch: Batch, loss: Loss) -> dict[str, float]:
    tokens = tokens_of(batch)
    return loss_metrics(tokens, policy_objective(POLICY_LOSSES[loss.policy], tokens, loss), loss)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def test_each_is_what_its_name_says():
    batch, loss = random_batch(2), LOSS
    inside = [(row, t) for row, mask in enumerate(batch.mask) for t, m in enumerate(mask) if m]
    theta, prox, mu = (
        [column[r][t] for r, t in inside] for column in (batch.log_probs, batch.old_log_probs, batch.rollout_log_probs)
    )
    moved = [a - b for a, b in zip(theta, prox, strict=True)]
    want = {
        "clip_fraction": mean([policy_term(batch, r, t, loss)[2] for r, t in inside]),
        "mismatch_kl": mean([b - a for a, b in zip(prox, mu, strict=True)]),
        "mismatch_mean": mean([abs(b - a) for a, b in zip(prox, mu, strict=True)]),
        "mismatch_max": max(abs(b - a) for a, b in zip(prox, mu, strict=True)),
        "approximate_kl": mean([math.exp(d) - 1 - d for d in moved]),
        "negative_log_likelihood": -mean(theta),
        "correction_weight": mean([correction(batch, r, t, loss)[0] for r, t in inside]),
        "correction_truncated": mean([correction(batch, r, t, loss)[1] for r, t in inside]),
        "entropy": mean([batch.entropies[r][t] for r, t in inside]),
        "kl_reference": mean(
            [kl_term(batch.reference[r][t] - batch.log_probs[r][t], loss.kl_estimator)[0] for r, t in inside]
        ),
        "log_ratio_max": max(abs(a - b) for a, b in zip(theta, mu, strict=True)),
        "ratio_max": max(math.exp(d) for d in moved),
        "tokens": len(inside),
    }
    got = mean_metrics(measured(batch, loss))
    assert got == pytest.approx(want, abs=1e-10)
    assert 0 < got["clip_fraction"] < 1
    assert 0 < got["correction_truncated"] < 1


def test_micro_batches_add_up_to_the_batch():
    batch, total = random_batch(5), {}
    for start, stop in itertools.pairwise((0, 2, 4, 5, len(batch.mask))):
        accumulate(total, measured(batch.rows(start, stop), LOSS))
    assert total == pytest.approx(measured(batch, LOSS), abs=1e-10)


def test_a_part_that_the_loss_lacks_is_not_reported():
    batch = random_batch(1)
    tokens = tokens_of(batch)
    bare = type(tokens)(
        tokens.log_probs, tokens.old_log_probs, tokens.rollout_log_probs, tokens.advantages, tokens.mask, tokens.lengths
    )
    got = loss_metrics(bare, policy_objective(POLICY_LOSSES["ppo"], bare, Loss()), Loss())
    assert not {"entropy", "kl_reference"} & got.keys()


def test_the_largest_ratio_is_to_what_the_loss_divides_by():
    batch = random_batch(4)
    inside = [(row, t) for row, mask in enumerate(batch.mask) for t, m in enumerate(mask) if m]
    want = max(math.exp(batch.log_probs[r][t] - batch.rollout_log_probs[r][t]) for r, t in inside)
    assert measured(batch, Loss(old="mu", kl_coefficient=0.1))["ratio_max"] == pytest.approx(want)


def test_means_are_over_steps_for_what_a_step_has_once():
    total: dict[str, float] = {}
    for loss, norm, tokens, clipped in ((1.0, 2.0, 3.0, 1.0), (3.0, 6.0, 1.0, 1.0)):
        step = {"loss": loss, "gradient_norm": norm, "tokens": tokens, "clip_fraction": clipped, "ratio_max": norm}
        accumulate(total, step | {STEPS: 1.0})
    assert mean_metrics(total) == {
        "loss": 2.0,
        "gradient_norm": 4.0,
        "tokens": 4.0,
        "clip_fraction": 0.5,
        "ratio_max": 6.0,
    }


def test_no_trained_token_is_no_division_by_0():
    batch = random_batch(0).rows(4, 5)
    got = mean_metrics(measured(batch, LOSS))
    assert got["tokens"] == 0
    assert not any(got.values())
