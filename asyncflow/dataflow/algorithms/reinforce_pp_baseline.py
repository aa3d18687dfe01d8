"""REINFORCE++-baseline: REINFORCE++ of scores less their prompt's mean."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.reinforce_pp import reinforce_pp_baseline as advantages


@algorithm(least_samples=2)
def reinforce_pp_baseline(flow: Flow) -> None:
    """`reinforce_pp` that tells a hard prompt from an easy one by its other samples (Hu et al. 2025)."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
