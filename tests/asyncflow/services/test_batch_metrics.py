"""What is measured of each closed batch: the spread of its rewards and the length of its responses."""

from __future__ import annotations

import numpy as np

from asyncflow.services.batch_metrics import batch_metrics
from protocols.data.jagged import Jagged
from protocols.data.messages import Finish, Rollouts, Scores


def rollouts(*lengths: int, cut: int = 0) -> Rollouts:
    """Responses of these lengths to prompts of two tokens; the first `cut` of them reached max_tokens."""
    count, values = len(lengths), np.ones(sum(lengths), np.int32)
    return Rollouts(
        sample_ids=np.arange(count, dtype=np.int64),
        prompts=Jagged.from_lengths(np.ones(2 * count, np.int32), [2] * count),
        references=Jagged.from_texts([""] * count),
        responses=Jagged.from_lengths(values, lengths),
        log_probs=Jagged.from_lengths(values.astype(np.float32), lengths),
        versions=Jagged.from_lengths(values, lengths),
        loss_mask=Jagged.from_lengths(values.astype(np.uint8), lengths),
        finishes=np.array([Finish.LENGTH] * cut + [Finish.STOP] * (count - cut), np.uint8),
    )


def scores(*values: float) -> Scores:
    return Scores(sample_ids=np.arange(len(values), dtype=np.int64), scores=np.array(values, np.float32))


def test_the_lengths_of_the_responses_and_the_share_that_was_cut_are_measured():
    assert batch_metrics([rollouts(*range(1, 21), cut=5)]) == {
        "response_length_mean": 10.5,
        "response_length_p95": 19.0,
        "response_length_max": 20.0,
        "response_cut": 0.25,
        "prompt_length_mean": 2.0,
    }


def test_the_spread_of_the_rewards_is_that_of_the_samples_and_not_of_the_baselines():
    measured = batch_metrics([scores(0.0, 1.0, 0.0, 1.0), scores(9.0, 9.0, 9.0, 9.0)])
    assert (measured["reward_min"], measured["reward_max"], measured["reward_std"]) == (0.0, 1.0, 0.5)


def test_an_empty_batch_has_no_metrics():
    assert batch_metrics([scores(), rollouts()]) == {}
