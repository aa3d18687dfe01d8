"""Safe-RLHF (PPO-Lagrangian): maximise the reward under a limit on the mean cost.

The multiplier lambda is the dual variable of the constraint "mean cost at most d": it rises while the mean cost is
above d, so that the cost weighs more, and falls while it is below.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.messages import Costs, Experience, LogProbs, Metrics, Rollouts, Scores, Values
from protocols.stage import Stateful
from workers.advantages.experience import experience_of, spread
from workers.advantages.gae import advantages_and_returns
from workers.advantages.rewards import token_rewards
from workers.advantages.whitening import whiten

LARGEST_REWARD = 50.0  # a token's reward and cost are clamped to +- this
LARGEST_STEP = math.log(100.0)  # of log lambda: a step changes lambda by a factor of 100 at most


class Multiplier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The multiplier lambda and the costs of the last samples."""

    value: float  # lambda, 0 or more
    costs: list[float] = []  # of the last samples, oldest first, at most a window

    def after(
        self, costs: npt.NDArray[np.floating], *, limit: float, rate: float, most: float, window: int
    ) -> Multiplier:
        """log lambda += rate lambda J_C with J_C = mean(window of costs) - limit, and log lambda <= log most.

        This is gradient ascent on lambda J_C in log lambda (Dai et al. 2024). The reference implementation does not
        bound a step by LARGEST_STEP: there, one extreme cost can take lambda to 0, where it stays. A lambda of 0 at the
        start stays 0. Raises ValueError if J_C is not finite.
        """
        recent = [*self.costs, *map(float, costs)][-window:]
        excess = excess_of(recent, limit)
        if not math.isfinite(excess):
            raise ValueError(f"mean cost less its limit {limit:g} is {excess}: the multiplier can't follow it")
        if self.value == 0.0:
            return Multiplier(0.0, recent)
        step = min(max(rate * self.value * excess, -LARGEST_STEP), LARGEST_STEP)
        logarithm = min(math.log(self.value) + step, math.log(most))
        return Multiplier(math.exp(logarithm), recent)


def excess_of(costs: list[float], limit: float) -> float:
    """J_C: mean cost less its limit; 0 without costs."""
    return math.fsum(costs) / len(costs) - limit if costs else 0.0


def safe_rlhf(
    rollouts: Rollouts,
    reference: LogProbs,
    values: Values,
    cost_values: Values,
    scores: Scores,
    costs: Costs,
    *,
    state: Multiplier | None = None,
    cost_limit: float = 0.0,
    multiplier: float = 1.0,
    multiplier_rate: float = 0.1,
    multiplier_most: float = 5.0,
    cost_window: float = 128,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    kl_coefficient: float = 0.01,
    whiten_advantages: bool = True,
) -> Stateful[Experience, Multiplier]:
    """PPO-Lagrangian (Dai et al. 2024): A = (A_R - lambda A_C) / (1 + lambda), then whitened like PPO's.

    r_t = score at the last trained token - kl_coefficient k1_t(mu, reference) and
    c_t = cost at the last trained token + kl_coefficient k1_t(mu, reference), both clamped to +-50; GAE on each with
    the values of its own critic. lambda starts at `multiplier`; each step updates it with its costs before it computes
    advantages. The pretraining loss (ptx) is part of the policy's loss: loss.ptx_coefficient. Raises ValueError for an
    argument out of range.
    """
    _check_multiplier(multiplier, multiplier_rate, multiplier_most, cost_window)
    before = state or Multiplier(multiplier)
    after = before.after(
        costs.costs, limit=cost_limit, rate=multiplier_rate, most=multiplier_most, window=int(cost_window)
    )
    mask, weight = rollouts.loss_mask, after.value

    earned = token_rewards(rollouts, reference, scores.scores, kl_coefficient, "k1")
    spent = token_rewards(rollouts, reference, costs.costs, -kl_coefficient, "k1")
    (reward_advantages, returns), (cost_advantages, cost_returns) = (
        advantages_and_returns(
            mask.with_values(np.clip(rewards, -LARGEST_REWARD, LARGEST_REWARD)),
            expected.values,
            mask,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        for rewards, expected in ((earned.rewards, values), (spent.rewards, cost_values))
    )
    advantages = (reward_advantages - weight * cost_advantages) / (1.0 + weight)
    metrics = {
        "kl": earned.kl,
        "multiplier": weight,
        "cost_excess": excess_of(after.costs, cost_limit),
        "cost_limit": cost_limit,
        "advantage_std": spread(advantages, mask),
    }
    if whiten_advantages:
        advantages = whiten(advantages, mask.values)
    experience = experience_of(
        rollouts,
        advantages,
        reference,
        returns=returns,
        values=values.values,
        cost_returns=cost_returns,
        cost_values=cost_values.values,
    )
    return Stateful(experience, Metrics(values=metrics), after)


def _check_multiplier(multiplier: float, rate: float, most: float, window: float) -> None:
    if not 0.0 < most < math.inf or not 0.0 <= multiplier <= most:
        raise ValueError(f"multiplier = {multiplier:g}: want 0 to multiplier_most = {most:g}, which is above 0")
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"multiplier_rate = {rate:g}: want 0 or more")
    if not window >= 1 or window % 1:
        raise ValueError(f"cost_window = {window}: want a whole number of samples, 1 or more")
