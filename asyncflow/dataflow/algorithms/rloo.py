"""RLOO: the mean of a prompt's other samples is the baseline, and a whole response is one action."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.rloo import rloo as advantages
from workers.settings import Loss


@algorithm(loss=Loss(aggregation="sequence-mean-token-sum"), least_samples=2)
def rloo(flow: Flow) -> None:
    """Scores less KL, against the others' mean; token log-probs are summed, not averaged (Ahmadian et al. 2024)."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
