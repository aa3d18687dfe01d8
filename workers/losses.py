"""Policy and value losses as small pure functions of flat token tensors.

Each returns one loss per token; `reduce_loss` sums them against a *global* denominator, so neither loss nor
gradient depends on how a batch is cut into micro-batches or over data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from protocols.columns import Jagged
from workers.settings import Aggregation, Loss

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Loss], Tensor]

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 with room for an advantage


def ratio_of(log_probs: Tensor, proximal: Tensor) -> Tensor:
    """pi_theta / pi_prox per token, clamped in log space to +-20."""
    return torch.exp((log_probs - proximal).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def ppo(log_probs: Tensor, proximal: Tensor, advantages: Tensor, loss: Loss) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (Schulman et al. 2017).

    With dual_clip c > 0 the loss is at most -c A where A < 0 (Ye et al. 2020).
    """
    ratio = ratio_of(log_probs, proximal)
    clipped = ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    per_token = torch.maximum(-ratio * advantages, -clipped * advantages)
    if loss.dual_clip > 0.0:
        bounded = torch.minimum(per_token, -loss.dual_clip * advantages)
        per_token = torch.where(advantages < 0, bounded, per_token)
    return per_token


POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo": ppo}


def clipped_tokens(log_probs: Tensor, proximal: Tensor, advantages: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """Number of trained tokens whose gradient a clip of `ppo` removes, the dual one included."""
    ratio = ratio_of(log_probs, proximal)
    high = (ratio > 1.0 + loss.clip_high) & (advantages > 0)
    low = (ratio < 1.0 - loss.clip_low) & (advantages < 0)
    dual = (ratio > (loss.dual_clip or math.inf)) & (advantages < 0)
    return ((high | low | dual) & (mask != 0)).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2) per token; clip 0 leaves the plain square."""
    squared = (values - returns) ** 2
    if clip > 0.0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared


def token_weights(mask: Jagged, how: Aggregation) -> Jagged:
    """What each token's loss is multiplied by, float32 like `mask`, from the whole mini-batch's mask.

    token-mean: 1 / trained tokens; sequence-mean-token-sum: 1 / rows; sequence-mean-token-mean:
    1 / (rows x the row's trained tokens). Rows without a trained token count nowhere.
    """
    trained = np.array([row.sum(dtype=np.int64) for row in mask], dtype=np.float64)
    rows = max(int((trained > 0).sum()), 1)
    match how:
        case "token-mean":
            per_row = np.full(len(mask), 1.0 / max(trained.sum(), 1.0))
        case "sequence-mean-token-sum":
            per_row = np.full(len(mask), 1.0 / rows)
        case "sequence-mean-token-mean":
            per_row = 1.0 / (rows * np.maximum(trained, 1.0))
    weights = np.repeat(per_row, mask.lengths) * (mask.values != 0)
    return mask.with_values(weights.astype(np.float32))


def reduce_loss(per_token: Tensor, weights: Tensor) -> Tensor:
    """Sum of per-token losses times their global weights: micro-batches' results add up to the batch's."""
    return (per_token * weights).sum()
