"""ReMax: the greedy response's score is the baseline, so one sample a prompt is enough and no critic is needed."""

from __future__ import annotations

import numpy as np

from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import on_tokens, without_critic
from workers.advantages.rewards import rewards_to_go, token_rewards
from workers.settings import KlEstimator


def remax(
    rollouts: Rollouts,
    reference: LogProbs,
    scores: Scores,
    greedy: Scores,
    *,
    kl_coefficient: float = 0.05,
    kl_estimator: KlEstimator = "k1",
) -> Measured[Experience]:
    """A_t = sum of r_s over s >= t, less the score of the prompt's greedy response (Li et al. 2024).

    r_t = score at the last trained token - kl_coefficient * kl_t(mu, reference). `greedy` has one row per sample: the
    score of the greedy response to its prompt.
    """
    mask = rollouts.loss_mask
    earned = token_rewards(rollouts, reference, scores.scores, kl_coefficient, kl_estimator)
    baseline = on_tokens(greedy.scores.astype(np.float64), mask)
    advantages = rewards_to_go(earned.rewards, mask, 1.0) - baseline
    return without_critic(
        rollouts,
        advantages,
        reference,
        kl=earned.kl,
        baseline_mean=float(greedy.scores.mean(dtype=np.float64)) if len(greedy) else 0.0,
    )
