"""CISPO: GRPO that clips the weight of a token and never its gradient."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.grpo import group_relative
from workers.settings import Loss


@algorithm(loss=Loss(policy="cispo", clip_low=1.0, clip_high=4.0), least_samples=2)
def cispo(flow: Flow) -> None:
    """GRPO's advantage and a mean over tokens (MiniMax-M1, 2025).

    The weight has no lower bound, and the upper one of ScaleRL (Khatri et al. 2025): 5.
    """
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts))
    flow.policy.update(joined.apply(group_relative))
