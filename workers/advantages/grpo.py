"""GRPO: group-relative advantage, (reward - group mean) / group standard deviation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocols.data.messages import Experience, LogProbs, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import on_tokens, without_critic
from workers.advantages.groups import SampleGroups, flat_share, group_deviations, group_means, groups_of
from workers.advantages.kl import Float64
from workers.advantages.rewards import kl_to_reference, mean_of_trained


def grpo(rollouts: Rollouts, reference: LogProbs, scores: Scores) -> Measured[Experience]:
    """A_i = (s_i - mean) / (std + 1e-6) over the prompt's samples, on every token (Shao et al. 2024).

    The deviation is the unbiased one and 1e-6 is added, as in verl; TRL adds 1e-4. A group of one has mean 0 and
    deviation 1, as in verl. GRPO's KL term is in the loss, not in the reward: here the reference's log-probs are passed
    on and the KL (k1) is only reported.
    """
    mask = rollouts.loss_mask
    kl = mean_of_trained(kl_to_reference(rollouts, reference, "k1"), mask)
    return _measured(rollouts, scores, reference, kl=kl)


def group_relative(rollouts: Rollouts, scores: Scores) -> Measured[Experience]:
    """GRPO's advantage for algorithms without a reference."""
    return _measured(rollouts, scores, None)


def standard_scores(scores: npt.NDArray[np.floating], groups: SampleGroups) -> Float64:
    """(s - mean) / (std + 1e-6) of each row within its group, [N]; 0 where all scores of a group are the same."""
    return (scores - group_means(scores, groups)) / (group_deviations(scores, groups) + 1e-6)


def _measured(rollouts: Rollouts, scores: Scores, reference: LogProbs | None, **metrics: float) -> Measured[Experience]:
    mask, groups = rollouts.loss_mask, groups_of(rollouts.sample_ids)
    advantages = on_tokens(standard_scores(scores.scores, groups), mask)
    return without_critic(
        rollouts,
        advantages,
        reference,
        flat_groups=flat_share(scores.scores, groups),
        **metrics,
    )
