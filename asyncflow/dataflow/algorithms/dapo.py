"""DAPO, GRPO for long responses: clip-higher, dynamic sampling, and a penalty for overlong responses."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from workers.advantages.dapo import dapo as advantages
from workers.advantages.dapo import trainable_groups
from workers.settings import Loss


@algorithm(loss=Loss(clip_high=0.28, dual_clip=0.0), least_samples=2)
def dapo(flow: Flow) -> None:
    """No reference; the overlong penalty is set in [advantage], see `workers.advantages.dapo` (Yu et al. 2025).

    Dynamic sampling: a prompt whose samples all have the same score teaches nothing. It is dropped and another one is
    admitted in its place, for up to `max_refills` rounds per step.
    """
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reward.score(rollouts)).keep(trainable_groups)
    flow.policy.update(joined.apply(advantages))
