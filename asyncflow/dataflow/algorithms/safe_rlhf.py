"""Safe-RLHF: PPO under a limit on the mean cost. PPO, plus a cost model, a critic of costs, and a multiplier."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.safe_rlhf import safe_rlhf as advantages


@algorithm
def safe_rlhf(flow: Flow) -> None:
    """The multiplier is the batch function's state and commits with its step (Dai et al. 2024).

    The pretraining loss is a term of the policy's own, as in any algorithm: loss.ptx_coefficient.
    """
    rollouts = flow.policy.generate(flow.prompts)
    experience = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.critic.values(rollouts),
        flow.cost_critic.values(rollouts),
        flow.reward.score(rollouts),
        flow.cost.score(rollouts),
    ).apply(advantages)
    flow.critic.update(experience)
    flow.cost_critic.update(experience)
    flow.policy.update(experience)
