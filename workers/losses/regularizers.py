"""Regularizers of the policy loss, per token and in nats: the KL to the reference and the entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.losses.tokens import bounded
from workers.settings import KlEstimator

_ENTROPY_NUMBERS = 1 << 22  # of logits at once, where entropies are only measured


def kl_loss(log_probs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimates of KL(theta || reference), [T], from tokens that theta sampled.

    With d = log ref - log pi_theta, clamped to +-20: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d (Schulman,
    "Approximating KL divergence", 2020). As terms of a loss their gradients differ more than their values: k2 has the
    gradient of this divergence, k3 (used by GRPO) that of the reverse divergence, and k1 a gradient whose mean is 0,
    so k1 belongs in the reward. Where d is clamped, the gradient is 0.
    """
    difference = bounded(reference - log_probs)
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return torch.expm1(difference) - difference  # expm1: near 0 the plain form cancels, even below 0


@torch.no_grad()
def measured_entropies(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """`token_entropies` at temperature 1 without a gradient: [T, V] -> [T].

    Faster than that and with less memory beside the logits: the normalizer is known from the log-probs [T] of some
    tokens [T], of finite logits.
    """
    if not len(logits):
        return log_probs
    normalizers = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_probs
    rows = max(1, _ENTROPY_NUMBERS // logits.shape[-1])
    return torch.cat([_entropies(*some) for some in zip(logits.split(rows), normalizers.split(rows), strict=True)])


def _entropies(logits: Tensor, normalizers: Tensor) -> Tensor:
    """log Z - sum p x, of logits x [t, V]."""
    probabilities = (logits - normalizers.unsqueeze(-1)).exp_()
    means = torch.linalg.vecdot(probabilities, logits)
    if means.isnan().any():  # a token that can't be sampled: 0 times -inf
        means = torch.linalg.vecdot(probabilities, logits.masked_fill(logits == -torch.inf, 0.0))
    return normalizers - means


def token_entropies(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log p of softmax(logits / temperature) in nats: [T, V] -> float32 [T]; temperature 0 reads as 1.

    Float64 logits stay float64. A logit of -inf, of a token that can't be sampled, adds 0: the limit of p log p.
    """
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / (temperature or 1.0)
    log_probs = torch.log_softmax(scaled, dim=-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)
