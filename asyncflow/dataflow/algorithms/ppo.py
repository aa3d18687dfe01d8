"""PPO with a critic and a KL term in the reward: the four models of RLHF."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.gae import gae


@algorithm
def ppo(flow: Flow) -> None:
    """Policy gradient with a clipped ratio; advantages by GAE."""
    rollouts = flow.policy.generate(flow.prompts)
    experience = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.critic.values(rollouts),
        flow.reward.score(rollouts),
    ).apply(gae)
    flow.critic.update(experience)
    flow.policy.update(experience)
