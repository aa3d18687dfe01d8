"""Random joined rows for the estimators: prompts with several samples, and responses with masked tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocols.data.ids import prompt_id, sample_id
from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs, Rollouts, Scores, Values

# Seven samples of three prompts, of 3, 3 and 1; the last token of some rows is masked.
MASK = Jagged.from_rows(
    [[1, 1, 1], [0, 1, 0, 1, 0], [1], [1, 1], [1, 0, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1]], np.uint8
)
GROUPS = (3, 3, 1)


def ids_of(groups: Sequence[int]) -> npt.NDArray[np.int64]:
    """Sample ids of prompts with these numbers of samples, in order."""
    ids = [sample_id(prompt_id(0, prompt), i) for prompt, size in enumerate(groups) for i in range(size)]
    return np.array(ids, np.int64)


def column(mask: Jagged, seed: int) -> Jagged:
    """A float32 column of normally distributed numbers."""
    return mask.with_values(np.random.default_rng(seed).normal(size=len(mask.values)).astype(np.float32))


def rollouts(mask: Jagged = MASK, groups: Sequence[int] = GROUPS, seed: int = 0) -> Rollouts:
    """Rollouts with this mask and random mu."""
    return Rollouts(
        sample_ids=ids_of(groups),
        prompts=Jagged.from_rows([[1]] * len(mask), np.int32),
        references=Jagged.from_texts([""] * len(mask)),
        responses=mask.with_values(mask.values.astype(np.int32)),
        log_probs=column(mask, seed + 1),
        versions=mask.with_values(np.zeros(len(mask.values), np.int32)),
        loss_mask=mask,
        finishes=np.zeros(len(mask), np.uint8),
    )


def reference(of: Rollouts, seed: int = 0) -> LogProbs:
    """Random log-probs of the reference."""
    return LogProbs(sample_ids=of.sample_ids, log_probs=column(of.loss_mask, seed + 3))


def values(of: Rollouts, seed: int = 0) -> Values:
    """Random critic values."""
    versions = np.zeros(len(of), np.int64)
    return Values(sample_ids=of.sample_ids, values=column(of.loss_mask, seed + 2), versions=versions)


def scores(of: Rollouts, numbers: Sequence[float] | None = None, seed: int = 0) -> Scores:
    """The given scores, or random ones."""
    values = np.random.default_rng(seed).normal(size=len(of)) if numbers is None else np.array(numbers)
    return Scores(sample_ids=of.sample_ids, scores=values.astype(np.float32))
