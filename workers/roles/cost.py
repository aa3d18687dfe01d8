"""Costs as a role: a rule on texts, or a trained cost model on tokens; positive is unsafe (Safe-RLHF)."""

from __future__ import annotations

from protocols.data.messages import Costs, Rollouts
from protocols.roles import Cost
from protocols.stage import Partial
from workers.parallel.sharding import NOT_COLLECTED
from workers.roles.scorer_role import ScorerRole


class CostWorker(ScorerRole, Cost):
    """One rank of a cost. The scorer's values are the costs."""

    role = "cost"

    def score(self, rollouts: Rollouts) -> Partial[Costs]:
        """A cost a row; a row that can't be scored fails with its cause."""
        if (scored := self._scorer.score(rollouts)) is None:
            return NOT_COLLECTED
        return Partial(Costs(sample_ids=scored.sample_ids, costs=scored.scores), scored.failures)
