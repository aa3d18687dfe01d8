"""Whitening: advantages with mean 0 and standard deviation 1, whatever the scale of the rewards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.advantages.kl import Float64


def whiten(advantages: Float64, mask: npt.NDArray[np.uint8]) -> Float64:
    """Shift and scale to mean 0 and standard deviation 1 over the mask; 0 outside it.

    (A - mean) / (std + 1e-8), where std is the population's. TRL's and verl's masked_whiten divide by
    sqrt(var + 1e-8) with the unbiased variance: for n tokens their result is sqrt((n - 1) / n) of this one. A single
    trained token has no deviation, and is not changed; verl raises an error.
    """
    inside = mask.astype(bool)
    chosen = advantages[inside]
    if len(chosen) < 2:
        return np.where(inside, advantages, 0.0)
    return np.where(inside, (advantages - chosen.mean()) / (chosen.std() + 1e-8), 0.0)
