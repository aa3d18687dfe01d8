"""A step from which the policy can learn nothing is told; any other is not."""

from __future__ import annotations

import numpy as np
import pytest

from asyncflow.control.reward_warnings import reward_warning
from asyncflow.services.batch_metrics import batch_metrics
from protocols.data.ids import sample_id
from protocols.data.messages import Scores


def warning(*groups: list[float], compares_samples: bool = True) -> str:
    """The warning about step 3, whose prompts' samples have these scores."""
    ids = [sample_id(prompt, index) for prompt, group in enumerate(groups) for index in range(len(group))]
    scores = Scores(
        sample_ids=np.array(ids, np.int64), scores=np.array([score for group in groups for score in group], np.float32)
    )
    metrics = batch_metrics([scores])
    return reward_warning(3, len(scores), len(groups), metrics, compares_samples=compares_samples)


def test_rewards_that_are_all_the_same_are_a_warning_for_every_algorithm():
    text = "all 4 rewards of step 3 are 0: the policy learns nothing from them"
    assert warning([0, 0], [0, 0]) == warning([0, 0], [0, 0], compares_samples=False) == text


def test_groups_of_equal_rewards_are_a_warning_where_the_samples_of_a_prompt_are_compared():
    assert "each of the 2 prompts of step 3 have equal rewards" in warning([1, 1], [0, 0])
    assert warning([1, 1], [0, 0], compares_samples=False) == ""


@pytest.mark.parametrize("groups", [[[1, 0], [0, 0]], [[1]], []])
def test_other_rewards_are_none(groups: list[list[float]]):
    assert warning(*groups) == ""
