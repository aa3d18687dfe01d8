"""What a closed batch says about its rewards: their spread, and the mean of each named part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from protocols.data.columns import Batch
from protocols.data.messages import Scores
from workers.advantages.groups import flat_share, groups_of

LOWEST, HIGHEST, FLAT_GROUPS = "reward_min", "reward_max", "reward_flat_groups"


def reward_metrics(inputs: Sequence[Batch]) -> dict[str, float]:
    """Metrics of the samples' rewards; none where no input has scores.

    "reward_min" and "reward_max"; "reward_flat_groups", the share of samples whose prompt's samples all have the same
    score; "reward.<name>", the mean of a part before its weight over the samples that have it. Of several inputs with
    scores the first is the samples' own: the others are baselines.
    """
    scores = next((batch for batch in inputs if isinstance(batch, Scores)), None)
    if scores is None or not len(scores):
        return {}
    lowest, highest = float(scores.scores.min()), float(scores.scores.max())
    flat = flat_share(scores.scores, groups_of(scores.sample_ids))
    return {LOWEST: lowest, HIGHEST: highest, FLAT_GROUPS: flat} | _parts(scores)


def _parts(scores: Scores) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in range(len(scores)) if len(scores.names.values) else ():
        if text := scores.names.text(row):
            for name, value in zip(text.split("\n"), scores.parts[row].tolist(), strict=True):
                values[name].append(value)
    return {f"reward.{name}": sum(found) / len(found) for name, found in values.items()}
