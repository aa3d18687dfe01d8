"""DAPO's own parts: a soft penalty for overlong responses, and the choice of trainable prompts (dynamic sampling)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocols.data.messages import Experience, Rollouts, Scores
from protocols.stage import Measured
from workers.advantages.experience import on_tokens, without_critic
from workers.advantages.groups import flat_share, groups_of, have_spread
from workers.advantages.grpo import standard_scores
from workers.advantages.kl import Float64


def dapo(
    rollouts: Rollouts,
    scores: Scores,
    *,
    overlong_limit: float = 0.0,
    overlong_buffer: float = 0.0,
    overlong_factor: float = 1.0,
) -> Measured[Experience]:
    """GRPO's advantage of scores less an overlong penalty (Yu et al. 2025); limit and buffer in tokens.

    overlong_limit is the recipe's generation.max_tokens; overlong_buffer = 0 turns the penalty off. Clip-higher and the
    token-level mean are in the loss; dynamic sampling is `trainable_groups`.
    """
    mask, groups = rollouts.loss_mask, groups_of(rollouts.sample_ids)
    shaped = scores.scores.astype(np.float64)
    if overlong_buffer:
        lengths = rollouts.responses.lengths
        shaped = shaped + overlong_penalty(lengths, overlong_limit, overlong_buffer, overlong_factor)
    advantages = on_tokens(standard_scores(shaped, groups), mask)
    return without_critic(
        rollouts,
        advantages,
        flat_groups=flat_share(scores.scores, groups),
        overlong_penalty=float((shaped - scores.scores).mean()) if len(scores) else 0.0,
    )


def overlong_penalty(lengths: npt.NDArray[np.int64], limit: float, buffer: float, factor: float = 1.0) -> Float64:
    """min(-(len - (limit - buffer)) / buffer * factor, 0): 0 up to limit - buffer tokens, -factor at the limit.

    Raises ValueError if the buffer is larger than the limit or not above 0.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong buffer of {buffer:g} tokens: want more than 0 and at most the limit, {limit:g}")
    return np.minimum(-(lengths - (limit - buffer)) / buffer * factor, 0.0)


def trainable_groups(scores: Scores) -> npt.NDArray[np.bool_]:
    """[N] rows whose prompt's scores differ: dynamic sampling keeps these and refills the rest.

    It reads the scores before the penalty: a group of equal scores would teach nothing but its lengths.
    """
    return have_spread(scores.scores, groups_of(scores.sample_ids))
