"""Whitening: advantages with mean 0 and standard deviation 1, whatever the scale of the rewards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.advantages.kl import Float64


def whiten(advantages: Float64, mask: npt.NDArray[np.uint8]) -> Float64:
    """Shift and scale to mean 0 and standard deviation 1 over the mask; 0 outside it."""
    inside = mask.astype(bool)
    chosen = advantages[inside]
    if len(chosen) < 2:
        return advantages
    return np.where(inside, (advantages - chosen.mean()) / (chosen.std() + 1e-8), 0.0)
