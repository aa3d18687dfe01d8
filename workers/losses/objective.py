"""The policy's whole loss on a micro-batch: (policy loss + KL term) x correction - entropy bonus.

The correction turns means over sampled tokens into means over theta's own tokens, so it also weighs the KL term: k3 of
a token that theta would hardly sample is exp(ref - theta), without bound, which stale tokens reach easily
(DeepSeek-V3.2, 2025); verl's correction weighs the policy loss alone. The entropy is over the whole distribution,
whichever policy sampled, and needs no correction.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from workers.losses import PolicyLoss
from workers.losses.corrections import Weights, correct
from workers.losses.regularizers import kl_loss
from workers.losses.tokens import Tokens, zeroed
from workers.settings import Loss


class Objective(NamedTuple):
    """The loss per token, and its parts for the metrics."""

    loss: Tensor  # [T], summed by `reduce_loss`
    clipped: Tensor  # bool [T], see Surrogate
    correction: Weights
    kl: Tensor | None = None  # [T] to the reference; None: no such term


def policy_objective(policy_loss: PolicyLoss, tokens: Tokens, loss: Loss) -> Objective:
    """Compose the parts that `loss` names. A coefficient of 0 leaves its part out.

    Masked tokens change nothing, whatever their numbers are. Raises ValueError where a part lacks its input: the
    reference's log-probs, or the entropies.
    """
    tokens = zeroed(tokens)
    surrogate, correction = policy_loss(tokens, loss), correct(tokens, loss)
    total, kl = surrogate.loss, None
    if loss.kl_coefficient:
        if tokens.reference is None:
            raise ValueError(
                f"kl_coefficient = {loss.kl_coefficient} needs the reference's log-probs, which are missing"
            )
        kl = kl_loss(tokens.log_probs, tokens.reference, loss.kl_estimator)
        total = total + loss.kl_coefficient * kl
    total = total * correction.values
    if loss.entropy_coefficient:
        if tokens.entropies is None:
            raise ValueError(f"entropy_coefficient = {loss.entropy_coefficient} needs entropies, got none")
        total = total - loss.entropy_coefficient * tokens.entropies
    return Objective(total, surrogate.clipped, correction, kl)
