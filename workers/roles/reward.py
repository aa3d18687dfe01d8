"""Rewards as a role: a rule on texts, a trained reward model on tokens, or a weighted mix of such."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from protocols.control.requests import CodeSource
from protocols.data.columns import Jagged
from protocols.data.messages import Rollouts, Scores
from protocols.roles import Reward
from protocols.stage import Partial, stage
from workers.rewards.scoring import ModelScorer, RuleScorer, Scorer, mixed_scorer
from workers.settings import Failures, Model


class _ScoredReward(Reward):
    """A scorer's numbers are scores."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @stage(protocol="DP_PROTO", balance="tokens")
    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; see the scorers for the rows that fail."""
        scored = self._scorer.score(rollouts)
        scores = Scores(sample_ids=scored.sample_ids, scores=scored.scores)
        if scored.parts is not None:
            rows, parts = scored.parts.shape
            scores = replace(scores, parts=Jagged.from_lengths(scored.parts.ravel(), np.full(rows, parts)))
        return Partial(scores, scored.failures)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the scorer's rules anew from their files. Raises BadCode."""
        self._scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        self._scorer.switch_code(take)

    def close(self) -> None:
        """Free what the scorer holds."""
        self._scorer.close()


class RuleReward(_ScoredReward):
    """Scores texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        super().__init__(RuleScorer(model, tokenizer_path, failures))


class ModelReward(_ScoredReward):
    """Scores tokens by a trained reward model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int) -> None:
        super().__init__(ModelScorer(model, tokens_per_micro_batch, "reward"))


class MixedReward(_ScoredReward):
    """The weighted sum of rules and models, with what each of them said."""

    def __init__(self, model: Model, tokenizer_path: str, tokens_per_micro_batch: int, failures: Failures) -> None:
        super().__init__(mixed_scorer(model, tokenizer_path, tokens_per_micro_batch, failures))
