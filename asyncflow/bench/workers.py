"""Workers that compute next to nothing, so that what is measured is the way there and back."""

from __future__ import annotations

from asyncflow.services.ranks.spec import ServiceSpec
from protocols.data.messages import LogProbs, Rollouts, Scores
from protocols.stage import stage


class Echo:
    """Answers with the log-probs that came, as fresh memory."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        self.rank = rank

    @stage(protocol="DP_PROTO")
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """The rows' own log-probs."""
        values = rollouts.log_probs.values.copy()
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=rollouts.log_probs.with_values(values))

    def close(self) -> None:
        """Nothing is held."""


class Relay:
    """Adds two scores, so that its stage is a join."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        self.rank = rank

    @stage(protocol="DP_PROTO")
    def add(self, left: Scores, right: Scores) -> Scores:
        """The sum of two scores a row."""
        return Scores(sample_ids=left.sample_ids, scores=left.scores + right.scores)

    def close(self) -> None:
        """Nothing is held."""
