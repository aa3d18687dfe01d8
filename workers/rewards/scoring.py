"""Scorers: one number per response, from a rule on texts or from a trained model at the last token.

Rewards and costs both come from a scorer. A row that can't be scored is a failure with its cause, never a 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.control.requests import CodeSource
from protocols.data.columns import select
from protocols.data.messages import Rollouts
from protocols.stage import Failure
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest
from workers.settings import Failures, Model, RewardPart
from workers.user_code import BadCode, module_of, source_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ScoredRows(NamedTuple):
    """The M rows that have a score, in their order, and the failures of the others."""

    sample_ids: npt.NDArray[np.int64]  # [M]
    scores: npt.NDArray[np.float32]  # [M] finite
    failures: list[Failure]
    parts: npt.NDArray[np.float32] | None = None  # [M, K] scores of a mixed scorer's parts, before their weights


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


class RuleScorer(Scorer):
    """Scores texts by a rule, which runs in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(tokenizer_path) / "tokenizer.json"))
        self._rule, self._timeout = model.rule, failures.reward_timeout_seconds
        self._process = RuleProcess(self._rule, self._timeout, _source_of(self._rule))
        self._next: RuleProcess | None = None  # runs the prepared rule until `switch_code`
        self._last: RuleRequest | None = None  # the last request that got a score: a new rule is tried out on it
        self._retries = failures.reward_retries

    def score(self, rollouts: Rollouts) -> ScoredRows:
        """Score each row by itself. A row fails with its last cause once every attempt has failed."""
        results = [self._score_row(rollouts, row) for row in range(len(rollouts))]
        scored = [row for row, result in enumerate(results) if not isinstance(result, Failure)]
        return ScoredRows(
            rollouts.sample_ids[scored],
            np.array([results[row] for row in scored], np.float32),
            [result for result in results if isinstance(result, Failure)],
        )

    def _score_row(self, rollouts: Rollouts, row: int) -> float | Failure:
        request = RuleRequest(
            prompt=self._tokenizer.decode(rollouts.prompts[row].tolist(), skip_special_tokens=True),
            response=self._tokenizer.decode(rollouts.responses[row].tolist(), skip_special_tokens=True),
            reference=rollouts.references.text(row),
        )
        cause = ""
        for _ in range(self._retries + 1):
            try:
                score = self._process.score(request)
                self._last = request
                return score
            except RuleFailed as error:
                cause = str(error)
        return Failure(int(rollouts.sample_ids[row]), cause)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Start a process of the new rule beside the running one; it has to score the last row that got a score."""
        self.switch_code(take=False)
        for source in sources:
            if source.module == module_of(self._rule):
                self._next = RuleProcess(self._rule, self._timeout, source)
                try:
                    self._next.start()
                    if self._last is not None:
                        self._next.score(self._last)
                except RuleFailed as error:
                    self.switch_code(take=False)
                    raise BadCode(str(error)) from error

    def switch_code(self, take: bool) -> None:
        """See Scorer."""
        if self._next is not None:
            kept, gone = (self._next, self._process) if take else (self._process, self._next)
            self._process, self._next = kept, None
            gone.close()

    def close(self) -> None:
        """End the rule's process."""
        self.switch_code(take=False)
        self._process.close()


def _source_of(rule: str) -> CodeSource | None:
    """The source of a user rule's module; None for a registered rule, or if it can't be read (then each row fails)."""
    try:
        return source_of(module) if (module := module_of(rule)) else None
    except BadCode:
        return None


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
        """Score each row by every part. The first part that fails a row names its cause; later parts skip the row."""
        failures: list[Failure] = []
        results: list[ScoredRows] = []
        left = rollouts
        for part, scorer in self._parts:
            result = scorer.score(left)
            assert result is not None, "no part of a mix is cut over ranks"
            failures += [Failure(failure.sample_id, f"{part.name}: {failure.cause}") for failure in result.failures]
            results.append(result)
            left = select(left, result.sample_ids)
        columns = [result.scores[np.isin(result.sample_ids, left.sample_ids)] for result in results]
        parts = np.stack(columns, axis=1).astype(np.float32)
        scores = parts.astype(np.float64) @ np.array([part.weight for part, _ in self._parts])
        return ScoredRows(left.sample_ids, scores.astype(np.float32), failures, parts)

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
