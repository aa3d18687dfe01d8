"""Dr. GRPO: GRPO without its two biased divisions, by the group's standard deviation and by the response's length."""

from __future__ import annotations

from protocols.data.messages import Experience, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import on_tokens, without_critic
from workers.advantages.groups import flat_share, group_means, groups_of


def dr_grpo(rollouts: Rollouts, scores: Scores) -> Measured[Experience]:
    """A_i = s_i - mean over the prompt's samples, on every token; a group of one has mean 0 (Liu et al. 2025).

    The other half is in the loss: aggregation = "sequence-mean-fixed-length".
    """
    mask, groups = rollouts.loss_mask, groups_of(rollouts.sample_ids)
    advantages = on_tokens(scores.scores - group_means(scores.scores, groups), mask)
    return without_critic(
        rollouts,
        advantages,
        flat_groups=flat_share(scores.scores, groups),
    )
