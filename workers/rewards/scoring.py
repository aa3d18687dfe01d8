"""Scorers: one number per response, from a rule on texts or from a trained model at the last token.

Rewards and costs both come from a scorer. A row that can't be scored is a failure with its cause, never a 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.control.code import CodeSource
from protocols.data.columns import select
from protocols.data.messages import Rollouts
from protocols.stage import Failure
from workers.settings import RewardPart


class ScoredRows(NamedTuple):
    """The M rows that have a score, in their order, and the failures of the others."""

    sample_ids: npt.NDArray[np.int64]  # [M]
    scores: npt.NDArray[np.float32]  # [M] finite
    failures: list[Failure]
    parts: Sequence[Mapping[str, float]] = ()  # [M] named parts of each score, before their weights; (): none has any


class Scorer(ABC):
    """Gives each row a score."""

    @abstractmethod
    def score(self, rollouts: Rollouts) -> ScoredRows | None:
        """Score every row that can be scored; the others are failures with their cause.

        None on a rank whose answer is not collected, where several ranks share a model.
        """

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:  # noqa: B027 - a model calls no code of a user
        """Load a user's rule from its new source, if it is among these, and try it out. Raises BadCode."""

    def switch_code(self, take: bool) -> None:  # noqa: B027
        """Use the prepared code from the next row on, or drop it."""

    def close(self) -> None:  # noqa: B027
        """Release processes and memory."""


def scored(sample_ids: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], role: str) -> ScoredRows:
    """The rows [N] with a model's scores [N]; a score that is not finite fails its row, naming the role."""
    finite = np.isfinite(scores)
    failures = [
        Failure(int(sample), f"{role} model gave {score}")
        for sample, score in zip(sample_ids[~finite], scores[~finite], strict=True)
    ]
    return ScoredRows(sample_ids[finite], scores[finite], failures)


class MixedScorer(Scorer):
    """The weighted sum of several scorers; the score of each part is reported beside it."""

    def __init__(self, parts: Sequence[tuple[RewardPart, Scorer]]) -> None:
        """Each part with its scorer, in the recipe's order."""
        self._parts = list(parts)

    def score(self, rollouts: Rollouts) -> ScoredRows:
        """Score each row by every part. The first part that fails a row names its cause; later parts skip the row.

        A part whose rule gives parts itself reports them as "<part>.<its part>".
        """
        failures: list[Failure] = []
        totals: dict[int, float] = dict.fromkeys(rollouts.sample_ids.tolist(), 0.0)
        parts: dict[int, dict[str, float]] = {sample: {} for sample in totals}
        left = rollouts
        for part, scorer in self._parts:
            result = scorer.score(left)
            assert result is not None, "no part of a mix is cut over ranks"
            failures += [Failure(failure.sample_id, f"{part.name}: {failure.cause}") for failure in result.failures]
            for row, (sample, score) in enumerate(zip(result.sample_ids.tolist(), result.scores.tolist(), strict=True)):
                totals[sample] += part.weight * score
                parts[sample][part.name] = score
                inner = result.parts[row] if result.parts else {}
                parts[sample] |= {f"{part.name}.{name}": value for name, value in inner.items()}
            left = select(left, result.sample_ids)
        samples = left.sample_ids.tolist()
        scores = np.array([totals[sample] for sample in samples], np.float64).astype(np.float32)
        return ScoredRows(left.sample_ids, scores, failures, [parts[sample] for sample in samples])

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Prepare every part."""
        for _, scorer in self._parts:
            scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Switch every part."""
        for _, scorer in self._parts:
            scorer.switch_code(take)

    def close(self) -> None:
        """Close every part."""
        for _, scorer in self._parts:
            scorer.close()
