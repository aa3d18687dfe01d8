"""REINFORCE++: PPO without a critic; the advantages are the returns, whitened over the batch."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.reinforce_pp import reinforce_pp as advantages


@algorithm
def reinforce_pp(flow: Flow) -> None:
    """Returns of each token, KL in the reward, with PPO's clipped loss (Hu et al. 2025)."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
