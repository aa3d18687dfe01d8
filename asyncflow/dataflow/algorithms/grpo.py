"""GRPO: advantages relative to the prompt's other samples. PPO without a critic, with the KL term in the loss."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.grpo import grpo as advantages
from workers.settings import Loss


@algorithm(loss=Loss(dual_clip=0.0, kl_coefficient=0.04, aggregation="sequence-mean-token-mean"), least_samples=2)
def grpo(flow: Flow) -> None:
    """Advantages relative to the group; k3 to the reference in the loss (Shao et al. 2024)."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
