"""Costs as a role: a rule on texts, or a trained cost model on tokens; positive is unsafe (Safe-RLHF)."""

from __future__ import annotations

from collections.abc import Sequence

from protocols.control.requests import CodeSource
from protocols.data.messages import Costs, Rollouts
from protocols.roles import Cost
from protocols.stage import Partial, stage
from workers.rewards.scoring import ModelScorer, RuleScorer, Scorer
from workers.settings import Failures, Model


class _ScoredCost(Cost):
    """A scorer's numbers are costs."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @stage(protocol="DP_PROTO", balance="tokens")
    def score(self, rollouts: Rollouts) -> Partial[Costs]:
        """A cost a row; see the scorers for the rows that fail."""
        scored = self._scorer.score(rollouts)
        return Partial(Costs(sample_ids=scored.sample_ids, costs=scored.scores), scored.failures)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the scorer's rules anew from their files. Raises BadCode."""
        self._scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        self._scorer.switch_code(take)

    def close(self) -> None:
        """Free what the scorer holds."""
        self._scorer.close()


class RuleCost(_ScoredCost):
    """The number that a rule gives a text is its cost; deadlines and retries are those of rewards."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        super().__init__(RuleScorer(model, tokenizer_path, failures))


class ModelCost(_ScoredCost):
    """Costs of tokens by a trained cost model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int) -> None:
        super().__init__(ModelScorer(model, tokens_per_micro_batch, "cost"))
