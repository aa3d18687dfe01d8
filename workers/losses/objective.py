"""The policy's whole loss of a micro-batch: (policy loss + KL term) x correction - entropy bonus.

A correction weighs what is a mean over the tokens that were drawn, so that it is one over theta's own. The KL term is:
k3 of a token that theta would hardly draw is exp(ref - theta), without bound, which no token that theta draws has
but seldom and every stale one may (DeepSeek-V3.2, 2025). An entropy is of the whole distribution, whoever drew.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from workers.losses import PolicyLoss
from workers.losses.corrections import Weights, correct
from workers.losses.regularizers import kl_terms
from workers.losses.tokens import Tokens
from workers.settings import Loss


class Objective(NamedTuple):
    """What is minimised, token by token, and what it was made of."""

    loss: Tensor  # [T], to be summed by `reduce_loss`
    clipped: Tensor  # bool [T], see Surrogate
    correction: Weights
    kl: Tensor | None = None  # [T] to the reference; None: no such term


def policy_objective(policy_loss: PolicyLoss, tokens: Tokens, loss: Loss) -> Objective:
    """Compose the parts that `loss` names. A coefficient of 0 leaves its part out.

    Raises ValueError where a part lacks its input: the reference's log-probs, or the entropies.
    """
    surrogate, correction = policy_loss(tokens, loss), correct(tokens, loss)
    total, kl = surrogate.loss, None
    if loss.kl_coefficient:
        if tokens.reference is None:
            raise ValueError(f"kl_coefficient = {loss.kl_coefficient} needs the reference's log-probs: there are none")
        kl = kl_terms(tokens.log_probs, tokens.reference, loss.kl_estimator)
        total = total + loss.kl_coefficient * kl
    total = total * correction.values
    if loss.entropy_coefficient:
        if tokens.entropies is None:
            raise ValueError(f"entropy_coefficient = {loss.entropy_coefficient} needs entropies: there are none")
        total = total - loss.entropy_coefficient * tokens.entropies
    return Objective(total, surrogate.clipped, correction, kl)
