"""Generalised advantage estimation with a per-token KL penalty in the reward.

Everything here reads a closed batch: whitening and the KL mean are over all of its rows, so a result never
depends on how the batch is cut later.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from protocols.columns import Jagged
from protocols.messages import Experience, LogProbs, Metrics, Rollouts, Scores, Values
from protocols.stage import Measured

Float64 = npt.NDArray[np.float64]
KlEstimator = Literal["k1", "k2", "k3"]


def kl_terms(log_probs: Float64, reference: Float64, estimator: KlEstimator) -> Float64:
    """Per-token estimates of KL(policy || reference) from samples of the policy.

    With d = reference - log_probs: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (Schulman, "Approximating KL
    divergence", 2020). Raises ValueError for another name.
    """
    difference = reference - log_probs
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return np.expm1(difference) - difference  # expm1: near 0 the plain form cancels, even below 0
    raise ValueError(f"kl_estimator {estimator!r}: one of k1, k2, k3")


def advantages_and_returns(
    rewards: Jagged, values: Jagged, mask: Jagged, *, gamma: float, gae_lambda: float
) -> tuple[Float64, Float64]:
    """GAE per row, float64 flat like `rewards` (Schulman et al. 2016).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, returns R_t = A_t + V_t. Where the
    mask is 0 (a tool's tokens, say) the next value and advantage carry through unchanged; there A and R are 0.
    """
    advantages = np.zeros(len(rewards.values), np.float64)
    returns = np.zeros_like(advantages)
    r, v, m = rewards.values.astype(np.float64), values.values.astype(np.float64), mask.values
    for start, stop in zip(rewards.offsets[:-1], rewards.offsets[1:], strict=True):
        next_value = next_advantage = 0.0
        for t in range(int(stop) - 1, int(start) - 1, -1):
            if not m[t]:
                continue
            next_advantage = r[t] + gamma * next_value - v[t] + gamma * gae_lambda * next_advantage
            next_value = v[t]
            advantages[t], returns[t] = next_advantage, next_advantage + v[t]
    return advantages, returns


def whiten(advantages: Float64, mask: npt.NDArray[np.uint8]) -> Float64:
    """Shift and scale to mean 0, standard deviation 1 over the mask; outside of it 0."""
    inside = mask.astype(bool)
    chosen = advantages[inside]
    if len(chosen) < 2:
        return advantages
    return np.where(inside, (advantages - chosen.mean()) / (chosen.std() + 1e-8), 0.0)


def gae(
    rollouts: Rollouts,
    reference: LogProbs,
    values: Values,
    scores: Scores,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    kl_coefficient: float = 0.05,
    kl_estimator: KlEstimator = "k1",
    whiten_advantages: bool = True,
) -> Measured[Experience]:
    """r_t = score at the last trained token - kl_coefficient * kl_t(mu, reference), then GAE, then whitening."""
    mask = rollouts.loss_mask
    kl = kl_terms(
        rollouts.log_probs.values.astype(np.float64), reference.log_probs.values.astype(np.float64), kl_estimator
    ) * (mask.values != 0)
    rewards = -kl_coefficient * kl
    rewards[_last_trained(mask)] += scores.scores
    column = mask.with_values
    advantages, returns = advantages_and_returns(
        column(rewards), values.values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    tokens = max(int(mask.values.sum()), 1)
    metrics = {
        "kl": float(kl.sum()) / tokens,
        "advantage_std": float(advantages[mask.values != 0].std()) if tokens > 1 else 0.0,
        "value_mean": float(values.values.values[mask.values != 0].sum(dtype=np.float64)) / tokens,
        "return_mean": float(returns.sum()) / tokens,
    }
    if whiten_advantages:
        advantages = whiten(advantages, mask.values)
    experience = Experience(
        sample_ids=rollouts.sample_ids,
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        loss_mask=mask,
        log_probs=rollouts.log_probs,
        advantages=column(advantages.astype(np.float32)),
        returns=column(returns.astype(np.float32)),
        values=values.values,
    )
    return Measured(experience, Metrics(values=metrics))


def _last_trained(mask: Jagged) -> npt.NDArray[np.int64]:
    """Flat index of the last token with mask 1 of each row. Raises ValueError for a row without one."""
    last = np.empty(len(mask), np.int64)
    for row in range(len(mask)):
        trained = np.flatnonzero(mask[row])
        if not len(trained):
            raise ValueError(f"row {row} has no trained token: an empty response is a failed sample, not data")
        last[row] = mask.offsets[row] + trained[-1]
    return last
