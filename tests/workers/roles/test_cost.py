"""Costs are scored like rewards and returned as `Costs`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.workers.roles.test_reward import rollouts
from workers.roles.cost import CostWorker
from workers.roles.reward import RewardWorker
from workers.settings import Failures, Model
from workers.training.models import load_reward

ROWS = [("6*7=", "42"), ("6*7=", "4212"), ("6*7=", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("cost"))


def test_the_number_of_a_rule_is_a_cost(folder: Path):
    cost = CostWorker(Model(rule="excess_characters"), 8192, str(folder), Failures())
    result = cost.score(rollouts(ROWS, reference="42", end=True))
    cost.close()
    result.batch.check()
    assert (result.batch.costs.tolist(), result.failures) == ([0, 2, 0], [])


def test_a_cost_model_is_a_reward_model_whose_score_is_a_cost(folder: Path):
    batch = rollouts(ROWS, end=True)
    costs = CostWorker(Model(path=str(folder)), 10_000).score(batch).batch
    costs.check()
    assert costs.sample_ids.tolist() == [50, 51, 52]
    np.testing.assert_array_equal(costs.costs, RewardWorker(Model(path=str(folder)), 10_000).score(batch).batch.scores)


def test_a_cost_that_is_not_a_number_fails_its_row_and_names_the_cost_model(folder: Path, tmp_path: Path):
    model = load_reward(folder)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[tiny.VOCABULARY["z"]] = torch.nan
    model.save_pretrained(tmp_path)
    result = CostWorker(Model(path=str(tmp_path)), 10_000).score(rollouts([("a", "z"), ("a", "b")]))
    assert [(failure.sample_id, failure.cause) for failure in result.failures] == [(50, "cost model gave nan")]
    assert result.batch.sample_ids.tolist() == [51]
