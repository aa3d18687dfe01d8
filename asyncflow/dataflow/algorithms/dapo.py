"""DAPO: GRPO for long responses: clip-higher, dynamic sampling, and a price for what is overlong."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.dapo import dapo as advantages
from workers.advantages.dapo import trainable_groups
from workers.settings import Loss


@algorithm(loss=Loss(clip_high=0.28, dual_clip=0.0), least_samples=2)
def dapo(flow: Flow) -> None:
    """No reference; the price is set in [advantage], see `workers.advantages.dapo` (Yu et al. 2025).

    Dynamic sampling: a prompt whose samples all score the same teaches nothing. It is dropped, and admission puts
    another in its place, for `max_refills` rounds of a step.
    """
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts)).keep(trainable_groups)
    flow.policy.update(joined.apply(advantages))
