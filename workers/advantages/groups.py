"""Statistics of the group of samples that share a prompt: mean, standard deviation, and whether scores differ.

Groups are found by the prompt in a sample's id, whatever the order of the rows. A group of one has mean 0 and
deviation 1, so that its score is used as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.data.ids import prompts_of
from workers.advantages.kl import Float64


class SampleGroups(NamedTuple):
    """The group of each of N rows."""

    of: npt.NDArray[np.int64]  # [N] index of the row's group
    sizes: npt.NDArray[np.int64]  # [N] rows in the row's group


def groups_of(sample_ids: npt.NDArray[np.int64]) -> SampleGroups:
    """Group rows by their prompt."""
    _, of, sizes = np.unique(prompts_of(sample_ids), return_inverse=True, return_counts=True)
    return SampleGroups(of, sizes[of])


def group_means(scores: npt.NDArray[np.floating], groups: SampleGroups) -> Float64:
    """Mean of each row's group, [N]; of a group of one 0."""
    return np.where(groups.sizes > 1, _sums(scores, groups) / groups.sizes, 0.0)


def group_deviations(scores: npt.NDArray[np.floating], groups: SampleGroups) -> Float64:
    """Unbiased standard deviation of each row's group, [N]; of a group of one 1."""
    squares = (scores - _sums(scores, groups) / groups.sizes) ** 2
    return np.where(groups.sizes > 1, np.sqrt(_sums(squares, groups) / np.maximum(groups.sizes - 1, 1)), 1.0)


def have_spread(scores: npt.NDArray[np.floating], groups: SampleGroups) -> npt.NDArray[np.bool_]:
    """[N] whether the scores of the row's group differ; equal scores give no learning signal."""
    low, high = np.full(len(scores), np.inf), np.full(len(scores), -np.inf)
    np.minimum.at(low, groups.of, scores)
    np.maximum.at(high, groups.of, scores)
    return (high > low)[groups.of]


def flat_share(scores: npt.NDArray[np.floating], groups: SampleGroups) -> float:
    """Share of rows whose group has equal scores, 0 to 1."""
    return float(1.0 - have_spread(scores, groups).mean()) if len(scores) else 0.0


def _sums(values: npt.NDArray[np.floating], groups: SampleGroups) -> Float64:
    totals = np.zeros(len(values), np.float64)
    np.add.at(totals, groups.of, values)
    return totals[groups.of]
