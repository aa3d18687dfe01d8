"""Builds `Experience` from rollouts and their advantages, with the metrics that every estimator reports."""

from __future__ import annotations

import numpy as np

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, LogProbs, Metrics, Rollouts
from protocols.stage import Measured
from workers.advantages.kl import Float64
from workers.advantages.rewards import last_trained


def on_tokens(per_row: Float64, mask: Jagged) -> Float64:
    """Copy one number per row [N] to each trained token of the row, flat like `mask`; 0 elsewhere.

    Raises ValueError for a row without a trained token.
    """
    last_trained(mask)
    return np.repeat(per_row, mask.lengths) * (mask.values != 0)


def experience_of(
    rollouts: Rollouts,
    advantages: Float64,
    reference: LogProbs | None = None,
    *,
    returns: Float64 | None = None,
    values: Jagged | None = None,
    cost_returns: Float64 | None = None,
    cost_values: Jagged | None = None,
) -> Experience:
    """The rollouts' rows with flat `advantages`, as float32. Columns of a model that the algorithm lacks become 0."""
    column = rollouts.loss_mask.with_values
    zeros = column(np.zeros(len(advantages), np.float32))
    return Experience(
        sample_ids=rollouts.sample_ids,
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        loss_mask=rollouts.loss_mask,
        log_probs=rollouts.log_probs,
        advantages=column(advantages.astype(np.float32)),
        returns=zeros if returns is None else column(returns.astype(np.float32)),
        values=zeros if values is None else values,
        reference=zeros if reference is None else reference.log_probs,
        cost_returns=zeros if cost_returns is None else column(cost_returns.astype(np.float32)),
        cost_values=zeros if cost_values is None else cost_values,
    )


def without_critic(
    rollouts: Rollouts, advantages: Float64, reference: LogProbs | None = None, **metrics: float
) -> Measured[Experience]:
    """Experience of an estimator that has no critic, with its metrics and the spread of the advantages."""
    values = {"advantage_std": spread(advantages, rollouts.loss_mask), **metrics}
    return Measured(experience_of(rollouts, advantages, reference), Metrics(values=values))


def spread(advantages: Float64, mask: Jagged) -> float:
    """Standard deviation of flat advantages over the trained tokens."""
    inside = advantages[mask.values != 0]
    return float(inside.std()) if len(inside) else 0.0
