"""The reward role: a rule on texts, a trained reward model on tokens, or a weighted mix of these."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from protocols.data.jagged import Jagged
from protocols.data.messages import Rollouts, Scores
from protocols.roles import Reward
from protocols.stage import Partial
from workers.parallel.sharding import NOT_COLLECTED
from workers.roles.scorer_role import ScorerRole


class RewardWorker(ScorerRole, Reward):
    """One rank of a reward. The scorer's values are the scores, with the parts that a mix or a rule gives them."""

    role = "reward"

    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; a row that can't be scored fails with its cause."""
        if (scored := self._scorer.score(rollouts)) is None:
            return NOT_COLLECTED
        scores = Scores(sample_ids=scored.sample_ids, scores=scored.scores)
        if scored.parts:
            scores = replace(
                scores,
                parts=Jagged.from_rows([list(parts.values()) for parts in scored.parts], np.float32),
                names=Jagged.from_texts("\n".join(parts) for parts in scored.parts),
            )
        return Partial(scores, scored.failures)
