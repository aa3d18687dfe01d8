"""The algorithms whose dataflow is simulated. Their functions are never called; only the graph's edges count."""

from __future__ import annotations

from asyncflow.dataflow.graph import Dataflow
from asyncflow.dataflow.trace import Flow, trace
from protocols.data.messages import Costs, Experience, LogProbs, Rollouts, Scores, Values
from protocols.roles import GREEDY, ROLES, Reward
from protocols.stage import stage


class Scorer(Reward):
    """Scores responses with the output of another stage: a join before the join of the batch."""

    @stage(protocol="DP_PROTO")
    def score_both(self, rollouts: Rollouts, log_probs: LogProbs) -> Scores:
        raise NotImplementedError

    @stage(protocol="DP_PROTO")
    def revise(self, scores: Scores) -> Scores:
        raise NotImplementedError


def ppo_advantage(rollouts: Rollouts, reference: LogProbs, values: Values, scores: Scores) -> Experience:
    raise NotImplementedError


def ppo_prox_advantage(
    rollouts: Rollouts, reference: LogProbs, prox: LogProbs, values: Values, scores: Scores
) -> Experience:
    raise NotImplementedError


def grpo_advantage(rollouts: Rollouts, reference: LogProbs, scores: Scores) -> Experience:
    raise NotImplementedError


def remax_advantage(rollouts: Rollouts, reference: LogProbs, scores: Scores, baseline: Scores) -> Experience:
    raise NotImplementedError


def safe_advantage(
    rollouts: Rollouts, reference: LogProbs, values: Values, cost_values: Values, scores: Scores, costs: Costs
) -> Experience:
    raise NotImplementedError


def ppo(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    experience = flow.join(
        rollouts, flow.reference.log_probs(rollouts), flow.critic.values(rollouts), flow.reward.score(rollouts)
    ).apply(ppo_advantage)
    flow.critic.update(experience)
    flow.policy.update(experience)


def ppo_prox(flow: Flow) -> None:
    """The policy recomputes log-probs: an edge from the generating service to the trained one."""
    rollouts = flow.policy.generate(flow.prompts)
    experience = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.policy.log_probs(rollouts),
        flow.critic.values(rollouts),
        flow.reward.score(rollouts),
    ).apply(ppo_prox_advantage)
    flow.critic.update(experience)
    flow.policy.update(experience)


def grpo(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    joined = flow.join(rollouts, flow.reference.log_probs(rollouts), flow.reward.score(rollouts))
    flow.policy.update(joined.apply(grpo_advantage))


def remax(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    greedy = flow.policy.generate(flow.prompts, sampling=GREEDY)
    joined = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.reward.score(rollouts),
        flow.reward.score(greedy),
        on="prompt",
    )
    flow.policy.update(joined.apply(remax_advantage))


def safe_rlhf(flow: Flow) -> None:
    rollouts = flow.policy.generate(flow.prompts)
    experience = flow.join(
        rollouts,
        flow.reference.log_probs(rollouts),
        flow.critic.values(rollouts),
        flow.cost_critic.values(rollouts),
        flow.reward.score(rollouts),
        flow.cost.score(rollouts),
    ).apply(safe_advantage)
    flow.critic.update(experience)
    flow.cost_critic.update(experience)
    flow.policy.update(experience)


def middle_join(flow: Flow) -> None:
    """Row stages that feed row stages: a chain, and a join of two edges in the middle of the graph."""
    rollouts = flow.policy.generate(flow.prompts)
    log_probs = flow.reference.log_probs(rollouts)
    scores = flow.reviser.revise(flow.scorer.score_both(rollouts, log_probs))
    flow.policy.update(flow.join(rollouts, log_probs, scores).apply(grpo_advantage))


ALGORITHMS: dict[str, Dataflow] = {
    f.__name__: trace(f, ROLES | {"scorer": Scorer, "reviser": Scorer})
    for f in (ppo, ppo_prox, grpo, remax, safe_rlhf, middle_join)
}
