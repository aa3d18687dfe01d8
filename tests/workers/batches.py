"""Random rows as trainers receive them, of uneven lengths and with a fixed seed."""

from __future__ import annotations

import numpy as np

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, Rollouts

VOCABULARY = 48  # of the models for these rows; divisible by up to four tensor ranks


def experience(rows: int) -> Experience:
    """Rows of 3 to 18 tokens. Some tokens, and all of the third row, are masked; the float columns are noise."""
    draw = np.random.default_rng(7)
    lengths = draw.integers(1, 12, rows)
    prompts = Jagged.from_rows([draw.integers(2, VOCABULARY, n) for n in draw.integers(2, 8, rows)], np.int32)
    responses = Jagged.from_rows([draw.integers(2, VOCABULARY, n) for n in lengths], np.int32)
    mask = [draw.random(n) < (0.0 if row == 2 else 0.8) for row, n in enumerate(lengths)]
    noise = [draw.normal(size=len(responses.values)).astype(np.float32) for _ in range(5)]
    rollout_log_probs, reference = (responses.with_values(n * 0.3 - 3.8) for n in noise[:2])
    advantages, returns, values = (responses.with_values(n) for n in noise[2:])
    return Experience(
        sample_ids=np.arange(70, 70 + rows, dtype=np.int64),
        prompts=prompts,
        responses=responses,
        loss_mask=Jagged.from_rows(mask, np.uint8),
        log_probs=rollout_log_probs,
        advantages=advantages,
        returns=returns,
        values=values,
        reference=reference,
        cost_returns=returns,
        cost_values=values,
    )


def rollouts(of: Experience) -> Rollouts:
    """The same rows as rollouts, before they are scored."""
    return Rollouts(
        sample_ids=of.sample_ids,
        prompts=of.prompts,
        references=Jagged.from_texts([""] * len(of)),
        responses=of.responses,
        log_probs=of.log_probs,
        versions=of.responses.with_values(np.zeros(len(of.responses.values), np.int32)),
        loss_mask=of.loss_mask,
        finishes=np.zeros(len(of), np.uint8),
    )
