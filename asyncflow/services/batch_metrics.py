"""What a closed batch says about its samples: the spread of their rewards, and the length of their responses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from protocols.data.columns import Batch
from protocols.data.messages import Finish, Rollouts, Scores
from workers.advantages.groups import flat_share, groups_of

LOWEST, HIGHEST, FLAT_GROUPS = "reward_min", "reward_max", "reward_flat_groups"


def batch_metrics(inputs: Sequence[Batch]) -> dict[str, float]:
    """The metrics of the batch's samples; of inputs of one kind the first is the samples' own, the others baselines."""
    scores = next((batch for batch in inputs if isinstance(batch, Scores)), None)
    rollouts = next((batch for batch in inputs if isinstance(batch, Rollouts)), None)
    return (reward_metrics(scores) if scores is not None and len(scores) else {}) | (
        response_metrics(rollouts) if rollouts is not None and len(rollouts) else {}
    )


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Metrics of the samples' rewards.

    "reward_min", "reward_max" and "reward_std"; "reward_flat_groups", the share of samples whose prompt's samples all
    have the same score; "reward.<name>", the mean of a part before its weight over the samples that have it.
    """
    lowest, highest = float(scores.scores.min()), float(scores.scores.max())
    flat = flat_share(scores.scores, groups_of(scores.sample_ids))
    spread = {LOWEST: lowest, HIGHEST: highest, "reward_std": float(scores.scores.std(dtype=np.float64))}
    return spread | {FLAT_GROUPS: flat} | _parts(scores)


def response_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths in tokens: "response_length_mean", "response_length_p95" (the shortest that 95 % do not exceed),
    "response_length_max" and "prompt_length_mean"; "response_cut", the share that `max_tokens` cut short.
    """
    lengths = rollouts.responses.lengths
    return {
        "response_length_mean": float(lengths.mean()),
        "response_length_p95": float(np.quantile(lengths, 0.95, method="inverted_cdf")),
        "response_length_max": float(lengths.max()),
        "response_cut": float(np.mean(rollouts.finishes == Finish.LENGTH)),
        "prompt_length_mean": float(rollouts.prompts.lengths.mean()),
    }


def _parts(scores: Scores) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in range(len(scores)) if len(scores.names.values) else ():
        if text := scores.names.text(row):
            for name, value in zip(text.split("\n"), scores.parts[row].tolist(), strict=True):
                values[name].append(value)
    return {f"reward.{name}": sum(found) / len(found) for name, found in values.items()}
