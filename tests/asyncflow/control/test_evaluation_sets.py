"""The curves of a held-out set: means of the scores, and pass@k as the share of the k-subsets with a passing answer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from asyncflow.control.evaluation_sets import EvaluationSet, pass_at
from protocols.data.ids import EVALUATION_EPOCH, prompt_id, sample_id
from protocols.data.messages import Scores
from protocols.roles import Sampling


@pytest.mark.parametrize("answers", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_the_choices_of_k_answers_with_one_that_passes(answers: int):
    for passed in range(answers + 1):
        outcomes = [i < passed for i in range(answers)]
        for k in range(1, answers + 1):
            want = np.mean([any(chosen) for chosen in combinations(outcomes, k)])
            got = pass_at(k, np.array([answers]), np.array([passed]))
            np.testing.assert_allclose(got, [want], atol=1e-12)


def test_pass_at_k_of_many_answers_does_not_overflow():
    np.testing.assert_allclose(pass_at(1, np.array([5000]), np.array([50])), [0.01])
    assert pass_at(1000, np.array([5000]), np.array([0])) == 0.0
    assert pass_at(4951, np.array([5000]), np.array([50])) == 1.0


def test_a_metric_makes_a_curve_of_its_mean_and_one_of_each_pass_at_k():
    wanted = EvaluationSet("sums", {"close": "evaluator"}, Sampling(), 4, 0, pass_at=[1, 2], pass_score=0.5)
    prompts = [prompt_id(EVALUATION_EPOCH, i) for i in range(2)]
    ids = np.array([sample_id(p, i) for p in prompts for i in range(4)], np.int64)
    order = np.array([3, 7, 0, 5, 1, 6, 2, 4])  # answers come in any order
    scores = np.array([1.0, 0.5, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0], np.float32)
    points = wanted.points(Scores(sample_ids=ids[order], scores=scores[order]))
    assert wanted.curves("close") == ["sums.close", "sums.close.pass@1", "sums.close.pass@2"]
    np.testing.assert_allclose(points, [1.75 / 8, 0.25, (1 - 1 / 6) / 2])
