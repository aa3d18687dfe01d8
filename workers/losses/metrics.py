"""Metrics of the policy loss: sums and maxima that add up over micro-batches and ranks, and the means made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.losses.objective import Objective
from workers.losses.tokens import Tokens, bounded, log_ratio
from workers.settings import Loss

TOKENS, STEPS = "tokens", "optimizer_steps"  # the denominators of the other metrics
MAXIMA = ("log_ratio_max", "ratio_max", "mismatch_max")
PER_STEP = ("loss", "ptx_loss", "gradient_norm", "learning_rate")  # the rest is per trained token


@torch.no_grad()
def loss_metrics(tokens: Tokens, objective: Objective, loss: Loss) -> dict[str, float]:
    """Sums and maxima of one micro-batch, by the names that `mean_metrics` reports, and its count of trained tokens."""
    # mu against prox, the weights that sampled against those at the start of the step. At staleness 0 these are the
    # same, and what is left is the numerical error between the generation engine and the trainer.
    drift, moved = tokens.rollout_log_probs - tokens.old_log_probs, bounded(tokens.log_probs - tokens.old_log_probs)
    per_token = {
        "clip_fraction": objective.clipped,
        "mismatch_kl": drift,  # k1
        "mismatch_mean": drift.abs(),
        "approximate_kl": torch.expm1(moved) - moved,  # k3 of prox against theta: how far the step has moved
        "negative_log_likelihood": -tokens.log_probs,  # of the sampled tokens: a one-sample estimate of the entropy
        "correction_weight": objective.correction.values,
        "correction_truncated": objective.correction.truncated,
    }
    if tokens.entropies is not None:
        per_token["entropy"] = tokens.entropies
    if objective.kl is not None:
        per_token["kl_reference"] = objective.kl
    sums = [_inside(values, tokens).sum() for values in per_token.values()]
    largest = [
        _largest((tokens.log_probs - tokens.rollout_log_probs).abs(), tokens),
        _largest(torch.exp(bounded(log_ratio(tokens, loss))), tokens),
        _largest(drift.abs(), tokens),
    ]
    numbers = torch.stack([*sums, *largest, tokens.mask.sum().to(sums[0].dtype)]).tolist()  # one wait for the device
    return dict(zip([*per_token, *MAXIMA, TOKENS], numbers, strict=True))


def accumulate(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add the sums and maxima of another micro-batch or rank to `total`."""
    for name, value in part.items():
        before = total.get(name, 0.0)
        total[name] = max(before, value) if name in MAXIMA else before + value


def mean_metrics(total: Mapping[str, float]) -> dict[str, float]:
    """Divide sums by optimizer steps or by trained tokens; maxima and the token count stay as they are."""
    steps, tokens = total.get(STEPS) or 1.0, total.get(TOKENS) or 1.0
    divisors: dict[str, float] = {**dict.fromkeys(PER_STEP, steps), **dict.fromkeys((*MAXIMA, TOKENS), 1.0)}
    return {name: value / divisors.get(name, tokens) for name, value in total.items() if name != STEPS}


def _inside(values: Tensor, tokens: Tokens) -> Tensor:
    """Values of the trained tokens as float32; float64 stays float64."""
    return values[tokens.mask].to(tokens.log_probs.dtype)


def _largest(values: Tensor, tokens: Tokens) -> Tensor:
    inside = _inside(values, tokens)
    return inside.max() if len(inside) else inside.new_zeros(())
