"""Costs as a role: a rule on texts, or a trained cost model on tokens; positive is unsafe (Safe-RLHF)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocols.data.messages import Costs, Rollouts
from protocols.roles import Cost
from protocols.stage import Partial
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.rewards.scoring import RuleScorer
from workers.roles.scorer_role import ScorerRole
from workers.settings import Failures, Model

if TYPE_CHECKING:
    pass


class CostWorker(ScorerRole, Cost):
    """One rank of a cost. Its scorer's numbers are the costs."""

    def score(self, rollouts: Rollouts) -> Partial[Costs]:
        """A cost a row; a row that can't be scored fails with its cause."""
        if (scored := self._scorer.score(rollouts)) is None:
            return NOT_COLLECTED
        return Partial(Costs(sample_ids=scored.sample_ids, costs=scored.scores), scored.failures)


class RuleCost(CostWorker):
    """The number that a rule gives a text is its cost; deadlines and retries are those of rewards."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        super().__init__(RuleScorer(model, tokenizer_path, failures))


class ModelCost(CostWorker):
    """Costs of tokens by a trained cost model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int, *, sharding: Sharding = ONE_DEVICE) -> None:
        from workers.roles.model_scorer import ModelScorer

        scorer = ModelScorer(model, tokens_per_micro_batch, "cost", sharding)
        super().__init__(scorer, scorer.offloader)
        self.model = scorer.model
