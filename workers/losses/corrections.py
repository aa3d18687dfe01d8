"""Off-policy corrections: a weight per token from k = pi_prox / mu, independent of the policy loss.

mu is the probability that the engine recorded when it sampled the token. k differs from 1 by the sample's age in
versions and by the engine's numerical differences. A weight carries no gradient and never enters a denominator: a
token of weight 0 still counts in its mean. verl's rejection sampling takes it out of the mask, and so out of the
denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workers.losses.tokens import Tokens, beyond_bound, bounded, row_means
from workers.settings import Correction, Loss


class Weights(NamedTuple):
    """A factor for each token's loss."""

    values: Tensor  # [T], no gradient
    truncated: Tensor  # bool [T], tokens whose weight was set to a bound or to 0


def none(ratio: Tensor, loss: Loss) -> Weights:
    """1 everywhere: samples are treated as on policy."""
    return Weights(torch.ones_like(ratio), _nowhere(ratio))


def importance(ratio: Tensor, loss: Loss) -> Weights:
    """k itself, with `bounded` as its only bound: with PPO, decoupled PPO (Hilton et al. 2022; Fu et al. 2025)."""
    return Weights(ratio, _nowhere(ratio))


def tis(ratio: Tensor, loss: Loss) -> Weights:
    """min(k, C): truncated importance sampling (Ionides 2008; Yao et al. 2025 for rollout engines)."""
    return Weights(ratio.clamp(max=loss.tis_cap), ratio > loss.tis_cap)


def icepop(ratio: Tensor, loss: Loss) -> Weights:
    """k where a <= k <= b, else 0: tokens with extreme ratios are dropped, not clipped (IcePop, Ling team 2025)."""
    outside = (ratio < loss.icepop_low) | (ratio > loss.icepop_high)
    return Weights(ratio.masked_fill(outside, 0.0), outside)


CORRECTIONS: dict[Correction, Callable[[Tensor, Loss], Weights]] = {
    "none": none,
    "importance": importance,
    "tis": tis,
    "icepop": icepop,
}


def correct(tokens: Tokens, loss: Loss) -> Weights:
    """The token correction that `loss` names, times its sequence mask."""
    log_ratio = (tokens.old_log_probs - tokens.rollout_log_probs).detach()
    weights = CORRECTIONS[loss.correction](torch.exp(bounded(log_ratio)), loss)
    outside = ~sequences_within(log_ratio, tokens, loss.sequence_low, loss.sequence_high or math.inf)
    if loss.correction != "none":
        weights = weights._replace(truncated=weights.truncated | beyond_bound(log_ratio))
    return Weights(weights.values.masked_fill(outside, 0.0), weights.truncated | outside)


def sequences_within(log_ratio: Tensor, tokens: Tokens, low: float, high: float) -> Tensor:
    """bool [T]: tokens of rows with low <= exp(mean of log k over the row's trained tokens) <= high.

    Unlike the product, the geometric mean does not drift with a row's length.
    """
    ratio = torch.exp(bounded(row_means(log_ratio, tokens)))
    return (ratio >= low) & (ratio <= high)


def _nowhere(ratio: Tensor) -> Tensor:
    return torch.zeros_like(ratio, dtype=torch.bool)
