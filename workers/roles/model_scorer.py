"""Reward and cost models: a trained model with one label, read at the last token of prompt + response."""

from __future__ import annotations

from protocols.data.messages import Rollouts
from workers.parallel.backends import frozen_model
from workers.parallel.sharding import Sharding
from workers.rewards.scoring import ScoredRows, Scorer, scored
from workers.settings import Model
from workers.training.models import sequence_scores


class ModelScorer(Scorer):
    """One rank of such a model.

    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """

    def __init__(self, model: Model, tokens_per_micro_batch: int, role: str, sharding: Sharding) -> None:
        """`role` is the name that failures carry."""
        self.model = frozen_model(model, sharding, head="score")
        self._budget = tokens_per_micro_batch
        self._role = role

    def score(self, rollouts: Rollouts) -> ScoredRows | None:
        """Score each row; a row whose score is not finite fails. None on a rank that is not collected."""
        scores = self.model.outputs(rollouts, self._budget, sequence_scores, per_row=True)
        if scores is None or not self.model.is_output_rank:
            return None
        return scored(rollouts.sample_ids, scores, self._role)
