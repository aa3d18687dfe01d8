"""What the parts of a mixed reward came to in a closed batch, by name. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocols.columns import Batch
from protocols.messages import Scores


def breakdown(inputs: Sequence[Batch], names: Sequence[str]) -> dict[str, float]:
    """Mean of each part over the batch's samples, before its weight: "reward.<name>".

    Of several inputs with scores the first is the samples' own: the others are baselines. Nothing where no scores
    have as many parts as there are names, as those of an outside reward.
    """
    scores = next((batch for batch in inputs if isinstance(batch, Scores)), None)
    if scores is None or not names or not len(scores) or (scores.parts.lengths != len(names)).any():
        return {}
    means = scores.parts.values.reshape(len(scores), len(names)).mean(axis=0, dtype=np.float64)
    return {f"reward.{name}": float(mean) for name, mean in zip(names, means, strict=True)}
