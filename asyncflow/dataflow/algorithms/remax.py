"""ReMax: the greedy response's score is the baseline. PPO without a critic, with a second call of generate."""

from __future__ import annotations

from asyncflow.dataflow.trace import Flow, algorithm
from protocols.roles import GREEDY
from workers.advantages.remax import remax as advantages


@algorithm
def remax(flow: Flow) -> None:
    """Each of a prompt's samples against its one greedy response; KL in the reward (Li et al. 2024)."""
    rollouts = flow.policy.generate(flow.prompts)
    greedy = flow.policy.generate(flow.prompts, sampling=GREEDY)
    experience = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.reward.score(rollouts),
        flow.reward.score(greedy),
        on="prompt",
    ).apply(advantages)
    flow.policy.update(experience)
