"""Costs as a role: a rule on texts, or a trained cost model on tokens; positive is unsafe (Safe-RLHF)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocols.control.requests import CodeSource
from protocols.data.messages import Costs, Rollouts
from protocols.roles import Cost
from protocols.stage import Partial
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.rewards.scoring import RuleScorer, Scorer
from workers.settings import Failures, Model

if TYPE_CHECKING:
    from workers.training.offload import Offloader


class CostWorker(Cost):
    """One rank of a cost. Its scorer's numbers are the costs."""

    def __init__(self, scorer: Scorer, offloader: Offloader | None = None) -> None:
        self._scorer = scorer
        self.offloader = offloader  # of the scorer's model; None where it has none

    def score(self, rollouts: Rollouts) -> Partial[Costs]:
        """A cost a row; a row that can't be scored fails with its cause."""
        if (scored := self._scorer.score(rollouts)) is None:
            return NOT_COLLECTED
        return Partial(Costs(sample_ids=scored.sample_ids, costs=scored.scores), scored.failures)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the scorer's rule anew from its file. Raises BadCode."""
        self._scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        self._scorer.switch_code(take)

    def close(self) -> None:
        """Free what the scorer holds."""
        self._scorer.close()


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
