"""Input and output of a policy loss: flat tensors over the response tokens of one micro-batch, row by row.

T is the number of response tokens, n the number of rows. A row is never split between micro-batches, so sums and
means within rows do not depend on the split.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from workers.settings import Loss

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 with room for an advantage


@dataclass(frozen=True, slots=True)
class Tokens:
    """One micro-batch. Only `log_probs` and `entropies` carry a gradient.

    Log-probs are natural logarithms of the sampled token's probability, all at the same temperature. Those of masked
    tokens may be anything, such as -inf for a token that the policy could not have sampled: a loss gets `zeroed` ones.
    """

    log_probs: Tensor  # [T] under theta, the weights in training
    old_log_probs: Tensor  # [T] under prox, the weights at the start of the step
    rollout_log_probs: Tensor  # [T] under mu, the weights that sampled the token, as their engine computed it
    advantages: Tensor  # [T]
    mask: Tensor  # bool [T], True for trained tokens
    lengths: Tensor  # int64 [n], response tokens of each row
    reference: Tensor | None = None  # [T] under the frozen reference; None: no KL term in the loss
    entropies: Tensor | None = None  # [T] of the whole distribution, nats; they have a gradient for an entropy bonus


def zeroed(tokens: Tokens) -> Tokens:
    """The tokens with 0 for each number of a masked one, through which no gradient flows.

    A weight of 0 would not do: 0 times infinity is NaN, in a loss and in its gradient.
    """
    columns = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    numbers = {n: c for n, c in columns.items() if n not in ("mask", "lengths") and c is not None}
    return replace(tokens, **{name: trained(column, tokens.mask) for name, column in numbers.items()})


def trained(values: Tensor, mask: Tensor) -> Tensor:
    """Values [T] where the mask [T] is not 0, else 0."""
    return torch.where(mask != 0, values, 0.0)


class Surrogate(NamedTuple):
    """A policy loss per token. The values of masked tokens are ignored."""

    loss: Tensor  # [T]
    clipped: Tensor  # bool [T], tokens whose gradient was removed or bounded, by a clip or by `bounded`


def bounded(log_ratio: Tensor) -> Tensor:
    """Clamp a log-ratio to +-MAX_LOG_RATIO, so that its exponential is finite and not 0. Beyond, the gradient is 0."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def beyond_bound(log_ratio: Tensor) -> Tensor:
    """bool [T], whether `bounded` changes a log-ratio."""
    return log_ratio.abs() > MAX_LOG_RATIO


def log_ratio(tokens: Tokens, loss: Loss) -> Tensor:
    """log pi_theta - log pi_old, [T], unbounded; old is prox or mu as `loss.old` says."""
    return tokens.log_probs - (tokens.rollout_log_probs if loss.old == "mu" else tokens.old_log_probs)


def row_means(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean of `values` [T] over each row's trained tokens, broadcast to every token of the row: [T].

    A row without a trained token has mean 0. No gradient flows.
    """
    row_of = torch.repeat_interleave(tokens.lengths)
    empty = values.new_zeros(len(tokens.lengths))
    sums = empty.index_add(0, row_of, torch.where(tokens.mask, values.detach(), 0.0))
    counts = empty.index_add(0, row_of, tokens.mask.to(values.dtype))
    return (sums / counts.clamp(min=1.0))[row_of]
