"""Workers that compute almost nothing, so that a benchmark measures the channels alone."""

from __future__ import annotations

from asyncflow.services.ranks.spec import ServiceSpec
from protocols.data.messages import LogProbs, Rollouts, Scores
from protocols.stage import stage


class EchoLogProbs:
    """Returns a copy of the log-probs that it received."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        """The arguments are those of every custom worker; none is used."""

    @stage(protocol="DP_PROTO")
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """A copy of the rows' own log-probs."""
        values = rollouts.log_probs.values.copy()
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=rollouts.log_probs.with_values(values))


class Relay:
    """Adds two scores: its stage joins two inputs."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        """The arguments are those of every custom worker; none is used."""

    @stage(protocol="DP_PROTO")
    def add(self, left: Scores, right: Scores) -> Scores:
        """The sum of both scores of each row."""
        return Scores(sample_ids=left.sample_ids, scores=left.scores + right.scores)
