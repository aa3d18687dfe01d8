"""The KL penalty in the reward: its per-token estimators, and the controller of an adaptive coefficient."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from workers.settings import KlEstimator

Float64 = npt.NDArray[np.float64]

_LARGEST_ERROR = 0.2  # bound of the relative error e in Ziegler et al.'s update


def kl_terms(log_probs: Float64, reference: Float64, estimator: KlEstimator) -> Float64:
    """Per-token estimates of KL(policy || reference) from samples of the policy.

    With d = reference - log_probs: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (Schulman, "Approximating KL
    divergence", 2020). Raises ValueError for another name.
    """
    difference = reference - log_probs
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return np.expm1(difference) - difference  # expm1: near 0 the plain form cancels, even below 0
    raise ValueError(f"kl_estimator {estimator!r}: one of k1, k2, k3")


class AdaptiveKl(msgspec.Struct, frozen=True):
    """A KL coefficient that is adapted so that the measured KL approaches a target."""

    coefficient: float
    target: float  # mean KL per token, nats
    horizon: int  # samples over which an error at its bound changes the coefficient by a fifth

    def __post_init__(self) -> None:
        for name, value in (("coefficient", self.coefficient), ("target", self.target), ("horizon", self.horizon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: an adaptive KL coefficient needs one above 0")

    def after(self, kl: float, samples: int) -> AdaptiveKl:
        """The coefficient after a step of n = `samples` samples whose mean KL was `kl` nats per token.

        beta (1 + e n / horizon) with e = clip(kl / target - 1, +-0.2) (Ziegler et al. 2019). Raises ValueError for a
        KL that is not finite, and for a step so large that the coefficient could fall to 0 or below.
        """
        if not math.isfinite(kl):
            raise ValueError(f"measured KL is {kl}: the coefficient {self.coefficient} can't follow it")
        share = samples / self.horizon
        if share * _LARGEST_ERROR >= 1.0:
            raise ValueError(
                f"{samples} samples a step at a horizon of {self.horizon}: one step could take the KL coefficient "
                f"to 0 or below; the horizon must be more than {samples * _LARGEST_ERROR:g} samples"
            )
        error = min(max(kl / self.target - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
        return msgspec.structs.replace(self, coefficient=self.coefficient * (1.0 + error * share))
