"""Concurrent services do at least as much as one alone, in threads and in processes."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from asyncflow.planner.calibration import contention
from asyncflow.planner.calibration.contention import computing, in_processes, in_threads, service_call
from asyncflow.planner.calibration.machine import CalibrationSizes
from asyncflow.planner.calibration.worker_harness import WorkerHarness
from asyncflow.recipe.checks import Checked, check
from protocols.data.messages import LogProbs
from tests.asyncflow.conftest import MakeRecipe

QUICKEST = CalibrationSizes(rows=(1, 4), trained_rows=(1, 4), contention_rows=2, rounds=1, seconds=0.05)


@pytest.fixture
def checked(make_recipe: MakeRecipe) -> Checked:
    return check(make_recipe(deterministic=False, models={"reward": {"rule": "exact_match"}}))


def test_who_has_a_model_computes_and_who_trains_comes_first(checked: Checked):
    assert computing(checked.recipe, checked.dataflow) == ["policy", "critic", "reference"]


def test_a_trainer_updates_and_the_others_infer(checked: Checked):
    with closing(
        WorkerHarness(checked.recipe, checked.dataflow, checked.train, QUICKEST, {"critic", "reference"})
    ) as harness:
        assert not isinstance(service_call(harness, "critic", 3)(), LogProbs)
        assert isinstance(service_call(harness, "reference", 3)(), LogProbs)


def test_threads_do_between_one_services_work_and_all_of_theirs(checked: Checked):
    with closing(WorkerHarness(checked.recipe, checked.dataflow, checked.train, QUICKEST)) as harness:
        own = in_threads(harness, 3)
    assert 1 <= own.cores <= 3 * (os.cpu_count() or 1)
    assert len(own.forward) == len(own.update) == 2


def test_a_process_gets_the_recipe_and_ends(checked: Checked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contention, "computing", lambda recipe, dataflow: ["policy"])
    with closing(WorkerHarness(checked.recipe, checked.dataflow, checked.train, QUICKEST, {"reward"})) as harness:
        own = in_processes(harness, 3)
    assert own.cores >= 1
    assert [timed.seconds > 0 for timed in (*own.forward, *own.update)] == [True] * 4


def test_a_process_that_ends_too_early_is_an_error(checked: Checked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contention, "computing", lambda recipe, dataflow: ["nobody"])
    with (
        closing(WorkerHarness(checked.recipe, checked.dataflow, checked.train, QUICKEST, {"reward"})) as harness,
        pytest.raises(RuntimeError, match="a calibration process exited with code 1 before it answered 'ready:'"),
    ):
        in_processes(harness, 3)
