"""PPO's estimator: generalised advantage estimation (GAE) from the critic's values, then whitening."""

from __future__ import annotations

import numpy as np

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, LogProbs, Metrics, Rollouts, Scores, Values
from protocols.stage import Measured
from workers.advantages.experience import experience_of, spread
from workers.advantages.kl import Float64
from workers.advantages.rewards import token_rewards
from workers.advantages.whitening import whiten
from workers.settings import KlEstimator


def advantages_and_returns(
    rewards: Jagged, values: Jagged, mask: Jagged, *, gamma: float, gae_lambda: float
) -> tuple[Float64, Float64]:
    """GAE per row, float64 flat like `rewards` (Schulman et al. 2016).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, returns R_t = A_t + V_t. Masked
    tokens (a tool's output, say) are skipped: the next value and advantage carry over them, and their A and R are 0.
    As in TRL and verl, V is 0 after the last token, also of a response that was cut at max_tokens.
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
    earned = token_rewards(rollouts, reference, scores.scores, kl_coefficient, kl_estimator)
    advantages, returns = advantages_and_returns(
        mask.with_values(earned.rewards), values.values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    inside = mask.values != 0
    tokens = max(int(mask.values.sum()), 1)
    metrics = {
        "kl": earned.kl,
        "advantage_std": spread(advantages, mask),
        "value_mean": float(values.values.values[inside].sum(dtype=np.float64)) / tokens,
        "return_mean": float(returns.sum()) / tokens,
    }
    if whiten_advantages:
        advantages = whiten(advantages, mask.values)
    experience = experience_of(rollouts, advantages, reference, returns=returns, values=values.values)
    return Measured(experience, Metrics(values=metrics))
