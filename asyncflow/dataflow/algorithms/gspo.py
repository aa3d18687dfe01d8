"""GSPO: GRPO that clips whole responses, by the mean of their tokens' log-ratios."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.grpo import group_relative
from workers.settings import Loss


@algorithm(
    loss=Loss(policy="gspo", clip_low=3e-4, clip_high=4e-4, dual_clip=0.0, aggregation="sequence-mean-token-mean"),
    least_samples=2,
)
def gspo(flow: Flow) -> None:
    """GRPO's advantage; ratio and clips are of the sequence, and so is the mean (Zheng et al. 2025)."""
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts))
    flow.policy.update(joined.apply(group_relative))
