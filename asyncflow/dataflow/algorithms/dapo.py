"""DAPO: GRPO for long responses: clip-higher, a mean over tokens, and a price for what is overlong."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.dapo import dapo as advantages
from workers.settings import Loss


@algorithm(loss=Loss(clip_high=0.28, dual_clip=0.0), least_samples=2)
def dapo(flow: Flow) -> None:
    """No reference; the price is set in [advantage], see `workers.advantages.dapo` (Yu et al. 2025).

    Not here yet is the paper's dynamic sampling, which refills the batch through admission where all samples of a
    prompt score the same. Such prompts are trained and teach nothing; the metric flat_groups tells their share.
    """
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
