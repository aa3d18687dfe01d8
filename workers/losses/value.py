"""The critic's loss: squared error to the returns, optionally clipped around the old values."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2) per token; clip = 0 gives the plain square.

    From the reference implementation of PPO (Dhariwal et al., OpenAI Baselines, 2017).
    """
    squared = (values - returns) ** 2
    if clip > 0.0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared
