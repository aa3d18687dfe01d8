"""Rewards per token: the score at the last trained token, less each token's KL penalty; and rewards-to-go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs, Rollouts
from workers.advantages.kl import Float64, kl_terms
from workers.settings import KlEstimator


class TokenRewards(NamedTuple):
    """The reward of each token, and the mean KL in it."""

    rewards: Float64  # flat like the responses; 0 where the mask is 0
    kl: float  # mean per trained token, nats, before its coefficient


def token_rewards(
    rollouts: Rollouts,
    reference: LogProbs,
    scores: npt.NDArray[np.floating],
    kl_coefficient: float,
    kl_estimator: KlEstimator,
) -> TokenRewards:
    """r_t = score [N] at the last trained token - kl_coefficient * kl_t(mu, reference) at every trained token.

    Raises ValueError for a row without a trained token.
    """
    mask = rollouts.loss_mask
    kl = kl_to_reference(rollouts, reference, kl_estimator)
    rewards = -kl_coefficient * kl
    rewards[last_trained(mask)] += scores
    return TokenRewards(rewards, mean_of_trained(kl, mask))


def kl_to_reference(rollouts: Rollouts, reference: LogProbs, estimator: KlEstimator) -> Float64:
    """kl_t(mu, reference) of each trained token, flat like the responses; 0 elsewhere."""
    inside = rollouts.loss_mask.values != 0
    columns = (rollouts.log_probs.values, reference.log_probs.values)
    mu, anchor = (np.where(inside, column, 0.0).astype(np.float64) for column in columns)  # 0 x infinity would be NaN
    return kl_terms(mu, anchor, estimator) * inside


def mean_of_trained(flat: Float64, mask: Jagged) -> float:
    """Mean over trained tokens of values that are 0 on all others."""
    return float(flat.sum()) / max(int(mask.values.sum()), 1)


def rewards_to_go(rewards: Float64, mask: Jagged, gamma: float) -> Float64:
    """G_t = r_t + gamma G_{t+1} over the trained tokens of each row, flat like `rewards`; 0 elsewhere."""
    returns = np.zeros_like(rewards)
    for start, stop in zip(mask.offsets[:-1].tolist(), mask.offsets[1:].tolist(), strict=True):
        to_go = 0.0
        for t in range(stop - 1, start - 1, -1):
            if mask.values[t]:
                to_go = rewards[t] + gamma * to_go
                returns[t] = to_go
    return returns


def last_trained(mask: Jagged) -> npt.NDArray[np.int64]:
    """Flat index of each row's last trained token. Raises ValueError for a row without one."""
    last = np.empty(len(mask), np.int64)
    for row in range(len(mask)):
        trained = np.flatnonzero(mask[row])
        if not len(trained):
            raise ValueError(f"row {row} has no trained token: an empty response is a failed sample, not data")
        last[row] = mask.offsets[row] + trained[-1]
    return last
