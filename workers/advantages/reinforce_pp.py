"""REINFORCE++: returns per token, whitened over the whole batch, with or without a group baseline."""

from __future__ import annotations

from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import spread, without_critic
from workers.advantages.groups import flat_share, group_means, groups_of
from workers.advantages.rewards import TokenRewards, rewards_to_go, token_rewards
from workers.advantages.whitening import whiten
from workers.settings import KlEstimator


def reinforce_pp(
    rollouts: Rollouts,
    reference: LogProbs,
    scores: Scores,
    *,
    gamma: float = 1.0,
    kl_coefficient: float = 0.05,
    kl_estimator: KlEstimator = "k1",
) -> Measured[Experience]:
    """G_t = r_t + gamma G_{t+1}, whitened over the trained tokens of the batch (Hu et al. 2025).

    r_t = score at the last trained token - kl_coefficient * kl_t(mu, reference).
    """
    earned = token_rewards(rollouts, reference, scores.scores, kl_coefficient, kl_estimator)
    return _whitened(rollouts, reference, earned, gamma)


def reinforce_pp_baseline(
    rollouts: Rollouts,
    reference: LogProbs,
    scores: Scores,
    *,
    gamma: float = 1.0,
    kl_coefficient: float = 0.05,
    kl_estimator: KlEstimator = "k1",
) -> Measured[Experience]:
    """`reinforce_pp` of scores less their group's mean, which is 0 for a group of one.

    The mean corrects for the prompt's difficulty. The scale is that of the whole batch, so small differences within a
    group are not amplified.
    """
    groups = groups_of(rollouts.sample_ids)
    relative = scores.scores - group_means(scores.scores, groups)
    earned = token_rewards(rollouts, reference, relative, kl_coefficient, kl_estimator)
    return _whitened(rollouts, reference, earned, gamma, flat_groups=flat_share(scores.scores, groups))


def _whitened(
    rollouts: Rollouts, reference: LogProbs, earned: TokenRewards, gamma: float, **metrics: float
) -> Measured[Experience]:
    mask = rollouts.loss_mask
    returns = rewards_to_go(earned.rewards, mask, gamma)
    return without_critic(
        rollouts,
        whiten(returns, mask.values),
        reference,
        kl=earned.kl,
        advantage_std=spread(returns, mask),  # before whitening: after it, it is 1
        **metrics,
    )
