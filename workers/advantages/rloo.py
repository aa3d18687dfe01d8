"""RLOO: the baseline is the mean of the prompt's other samples, so it is independent of the sample itself."""

from __future__ import annotations

import numpy as np

from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import on_tokens, without_critic
from workers.advantages.groups import flat_share, group_means, groups_of
from workers.advantages.rewards import token_rewards
from workers.settings import KlEstimator


def rloo(
    rollouts: Rollouts,
    reference: LogProbs,
    scores: Scores,
    *,
    kl_coefficient: float = 0.05,
    kl_estimator: KlEstimator = "k1",
) -> Measured[Experience]:
    """A_i = R_i - mean of the others' R = k / (k - 1) (R_i - mean) on every token of sample i (Ahmadian et al. 2024).

    R_i is the whole response's reward: its score less kl_coefficient times the sum of its tokens' KL(mu, reference),
    as in TRL's RLOOTrainer; so the baseline has the others' KL too. With k = 1 the baseline is 0, as in verl.
    """
    mask, groups = rollouts.loss_mask, groups_of(rollouts.sample_ids)
    earned = token_rewards(rollouts, reference, scores.scores, kl_coefficient, kl_estimator)
    totals = np.add.reduceat(earned.rewards, mask.offsets[:-1]) if len(rollouts) else earned.rewards
    others = groups.sizes / np.maximum(groups.sizes - 1, 1)
    advantages = on_tokens(others * (totals - group_means(totals, groups)), mask)
    return without_critic(
        rollouts,
        advantages,
        reference,
        kl=earned.kl,
        flat_groups=flat_share(scores.scores, groups),
    )
