"""Dr. GRPO: GRPO without its two biases, and without a reference."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.dr_grpo import dr_grpo as advantages
from workers.settings import Loss


@algorithm(loss=Loss(dual_clip=0.0, aggregation="sequence-mean-fixed-length"), least_samples=2)
def dr_grpo(flow: Flow) -> None:
    """Scores less their group's mean; each response's token sum over one constant (Liu et al. 2025).

    The constant is the most tokens that a response may have, unless the recipe says loss.fixed_length.
    """
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts))
    flow.policy.update(joined.apply(advantages))
