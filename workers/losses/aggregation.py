"""Aggregates per-token losses: each token has a weight whose denominator is global over the optimizer step.

Counts add up over micro-batches and data-parallel ranks, and so do losses and gradients. So a result does not depend
on how a batch was cut, and nothing is averaged over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from protocols.data.jagged import Jagged
from workers.losses.tokens import trained
from workers.settings import Loss


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts that denominators are made of, summed over all ranks."""

    tokens: int  # trained tokens
    rows: int  # rows with a trained token

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.rows + other.rows)


def counts_of(mask: Jagged) -> Counts:
    """The counts of some rows' loss mask."""
    lengths = _trained_lengths(mask)
    return Counts(int(lengths.sum()), int((lengths > 0).sum()))


def token_weights(mask: Jagged, counts: Counts, loss: Loss) -> Jagged:
    """The factor of each token's loss, float64 like `mask`; `counts` are those of the whole optimizer step.

    token-mean: 1 / trained tokens; sequence-mean-token-sum: 1 / rows; sequence-mean-token-mean:
    1 / (rows x the row's trained tokens); sequence-mean-fixed-length: 1 / (rows x fixed_length), which weighs a
    token the same in long and in short rows (Dr. GRPO, Liu et al. 2025). Rows without a trained token count nowhere.
    Raises ValueError for a fixed_length that a recipe has not resolved.
    """
    lengths = _trained_lengths(mask).astype(np.float64)
    rows = max(counts.rows, 1)
    match loss.aggregation:
        case "token-mean":
            per_row = np.full(len(mask), 1.0 / max(counts.tokens, 1.0))
        case "sequence-mean-token-sum":
            per_row = np.full(len(mask), 1.0 / rows)
        case "sequence-mean-token-mean":
            per_row = 1.0 / (rows * np.maximum(lengths, 1.0))
        case "sequence-mean-fixed-length":
            if not loss.fixed_length:
                raise ValueError("loss.fixed_length = 0: want the divisor in tokens, 1 or more")
            per_row = np.full(len(mask), 1.0 / (rows * loss.fixed_length))
    return mask.with_values(np.repeat(per_row, mask.lengths) * (mask.values != 0))


def reduce_loss(per_token: Tensor, weights: Tensor) -> Tensor:
    """Sum of per-token losses times their weights, both [T]; the sums of micro-batches add up to the batch's loss.

    A loss of weight 0 counts as 0 even where it is not finite.
    """
    return (trained(per_token, weights) * weights.to(per_token.dtype)).sum()


def _trained_lengths(mask: Jagged) -> np.ndarray:
    return np.array([np.count_nonzero(row) for row in mask], dtype=np.int64)
