"""An independent implementation of the policy's loss and its gradient: loops over numbers, derivatives by hand.

The tests compare workers.losses with it. It shares only the settings with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from protocols.data.jagged import Jagged
from workers.losses.tokens import Tokens
from workers.settings import Loss

Rows = list[list[float]]


@dataclass(frozen=True)
class Batch:
    """Columns as lists of rows, without padding."""

    log_probs: Rows
    old_log_probs: Rows
    rollout_log_probs: Rows
    reference: Rows
    advantages: Rows
    entropies: Rows
    mask: list[list[int]]

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows, as one micro-batch."""
        return Batch(*(column[start:stop] for column in vars(self).values()))

    @property
    def mask_column(self) -> Jagged:
        """The loss mask as a message column."""
        return Jagged.from_rows(self.mask, np.uint8)


class Answer(NamedTuple):
    """The loss, and its derivatives by each token's log-prob and by each token's entropy, flat."""

    loss: float
    by_log_probs: list[float]
    by_entropies: list[float]


def random_batch(
    seed: int, lengths: tuple[int, ...] = (3, 0, 5, 1, 4, 2, 6), moved: float = 0.5, stale: float = 0.5
) -> Batch:
    """Random numbers. `moved` is the standard deviation of log theta - log prox, `stale` that of log prox - log mu.

    Some tokens and the whole fifth row are masked.
    """
    rng = np.random.default_rng(seed)

    def column(scale: float, around: Rows | None = None) -> Rows:
        centres = around or [[0.0] * n for n in lengths]
        return [[c + rng.normal(0, scale) for c in row] for row in centres]

    old_log_probs = column(1.0)
    mask = [[int(rng.random() < 0.8) for _ in range(n)] for n in lengths]
    mask = [[0] * len(row) if i == 4 else row for i, row in enumerate(mask)]
    return Batch(
        log_probs=column(moved, old_log_probs),
        old_log_probs=old_log_probs,
        rollout_log_probs=column(stale, old_log_probs),
        reference=column(0.7, old_log_probs),
        advantages=column(1.0),
        entropies=[[abs(x) for x in row] for row in column(1.0)],
        mask=mask,
    )


def tokens_of(batch: Batch, requires_grad: bool = True) -> Tokens:
    """The rows as the losses take them, in float64; log_probs and entropies are leaves of the graph."""

    def flat(rows: Rows) -> torch.Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

    return Tokens(
        log_probs=flat(batch.log_probs).requires_grad_(requires_grad),
        old_log_probs=flat(batch.old_log_probs),
        rollout_log_probs=flat(batch.rollout_log_probs),
        advantages=flat(batch.advantages),
        mask=torch.tensor([bool(x) for row in batch.mask for x in row], dtype=torch.bool),
        lengths=torch.tensor([len(row) for row in batch.mask], dtype=torch.int64),
        reference=flat(batch.reference),
        entropies=flat(batch.entropies).requires_grad_(requires_grad),
    )


def objective(batch: Batch, loss: Loss) -> Answer:
    """The loss of a batch: (policy loss + KL) x correction - entropy, averaged by the aggregation."""
    total, by_log_probs, by_entropies = 0.0, [], []
    for row in range(len(batch.mask)):
        for t, inside in enumerate(batch.mask[row]):
            if not inside:
                by_log_probs.append(0.0)
                by_entropies.append(0.0)
                continue
            value, slope, _ = policy_term(batch, row, t, loss)
            factor, _ = correction(batch, row, t, loss)
            kl, kl_slope = kl_term(batch.reference[row][t] - batch.log_probs[row][t], loss.kl_estimator)
            share = weight(batch, row, loss)
            beta, eta = loss.kl_coefficient, loss.entropy_coefficient
            total += share * (factor * (value + beta * kl) - eta * batch.entropies[row][t])
            by_log_probs.append(share * factor * (slope + beta * kl_slope))
            by_entropies.append(-share * eta)
    return Answer(total, by_log_probs, by_entropies)


def policy_term(batch: Batch, row: int, t: int, loss: Loss) -> tuple[float, float, bool]:
    """One token's policy loss, its derivative, and whether it was clipped."""
    old = batch.rollout_log_probs if loss.old == "mu" else batch.old_log_probs
    log_prob, advantage = batch.log_probs[row][t], batch.advantages[row][t]
    ratio = math.exp(log_prob - old[row][t])
    match loss.policy:
        case "reinforce":
            return -advantage * log_prob, -advantage, False
        case "cispo":
            held = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            return -held * advantage * log_prob, -held * advantage, held != ratio
        case "gspo":
            steps = [x - y for x, y, m in zip(batch.log_probs[row], old[row], batch.mask[row], strict=True) if m]
            ratio = math.exp(sum(steps) / len(steps))
    return clipped(ratio, advantage, loss)


def clipped(ratio: float, advantage: float, loss: Loss) -> tuple[float, float, bool]:
    """PPO's clipped loss of one token, region by region."""
    if advantage >= 0:
        flat = 1 + loss.clip_high if ratio > 1 + loss.clip_high else None
    elif ratio < 1 - loss.clip_low:
        flat = 1 - loss.clip_low
    else:
        flat = loss.dual_clip if loss.dual_clip and ratio > loss.dual_clip else None
    return (-ratio * advantage, -ratio * advantage, False) if flat is None else (-flat * advantage, 0.0, True)


def correction(batch: Batch, row: int, t: int, loss: Loss) -> tuple[float, bool]:
    """One token's correction weight, and whether a bound changed it."""
    inside = [t for t, m in enumerate(batch.mask[row]) if m]
    mean = sum(batch.old_log_probs[row][t] - batch.rollout_log_probs[row][t] for t in inside) / len(inside)
    if not loss.sequence_low <= math.exp(mean) <= (loss.sequence_high or math.inf):
        return 0.0, True
    k = math.exp(batch.old_log_probs[row][t] - batch.rollout_log_probs[row][t])
    match loss.correction:
        case "none":
            return 1.0, False
        case "importance":
            return k, False
        case "tis":
            return min(k, loss.tis_cap), k > loss.tis_cap
        case "icepop":
            kept = loss.icepop_low <= k <= loss.icepop_high
            return (k if kept else 0.0), not kept


def kl_term(d: float, estimator: str) -> tuple[float, float]:
    """The KL estimate from d = log ref - log theta, and its derivative by log theta."""
    return {"k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (math.exp(d) - d - 1, 1 - math.exp(d))}[estimator]


def weight(batch: Batch, row: int, loss: Loss) -> float:
    """The weight of a trained token of the row in the mean."""
    trained = [sum(mask) for mask in batch.mask]
    rows = sum(n > 0 for n in trained)
    return {
        "token-mean": lambda: 1 / sum(trained),
        "sequence-mean-token-sum": lambda: 1 / rows,
        "sequence-mean-token-mean": lambda: 1 / (rows * trained[row]),
        "sequence-mean-fixed-length": lambda: 1 / (rows * loss.fixed_length),
    }[loss.aggregation]()
