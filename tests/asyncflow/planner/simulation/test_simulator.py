"""A simulated run is causal, and its times equal those added up by hand."""

from __future__ import annotations

import gc
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.control.admission.staleness import Admission
from asyncflow.dataflow.registry import ALGORITHMS
from asyncflow.planner.calibration.measured_speeds import MeasuredSpeed
from asyncflow.planner.costs.devices import Refused
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.simulator import simulate
from tests.asyncflow.planner.scenes import APART, COLOCATED, CRITIC, GENERATE, INFER, POLICY, SPLIT, scene


def test_colocated_services_take_turns():
    found = simulate(scene(COLOCATED))
    assert found.step_s == pytest.approx(GENERATE + 3 * INFER + CRITIC + POLICY)
    assert found.pool_idle["main"] == pytest.approx(0)
    assert found.staleness == {0: 1.0}


def test_pools_work_side_by_side():
    found = simulate(scene(SPLIT))
    assert found.step_s == pytest.approx(GENERATE + 2 * INFER + max(CRITIC, POLICY))
    busy = INFER * 2 + CRITIC
    assert found.pool_idle["b"] == pytest.approx(1 - busy / found.step_s)


def test_staleness_lets_the_next_batch_be_generated_while_this_one_trains():
    synchronous, ahead = (simulate(scene(APART, staleness)).step_s for staleness in (0, 1))
    assert synchronous == pytest.approx(GENERATE + INFER + POLICY)
    assert ahead == pytest.approx(max(GENERATE, POLICY))


def test_nothing_is_gained_by_staleness_where_all_share_one_device():
    assert simulate(scene(COLOCATED, 1)).step_s == pytest.approx(simulate(scene(COLOCATED)).step_s)


def test_cores_that_are_shared_bound_what_pools_gain():
    one = simulate(scene(APART, 1, cores=1.0)).step_s
    assert one == pytest.approx(GENERATE + 3 * INFER + CRITIC + POLICY)
    assert simulate(scene(APART, 1, cores=5.0)).step_s == pytest.approx(simulate(scene(APART, 1)).step_s)


def test_a_long_tail_makes_engines_and_trainers_wait():
    tailed = Lengths((8.0,) * 7 + (72.0,))  # of the same mean as the fixed ones
    fixed, generation = (
        simulate(scene(APART, 0, response=lengths, steps=40)) for lengths in (Lengths.fixed(16), tailed)
    )
    assert generation.batch_wait_s > 1.3 * fixed.batch_wait_s
    assert generation.pool_idle["a"] > fixed.pool_idle["a"]


def test_waiting_in_a_call_takes_no_core():
    delays = {"policy": {"update": 5.0}}
    slow = simulate(scene(COLOCATED, delays=delays, cores=1.0)).step_s
    assert slow == pytest.approx(simulate(scene(COLOCATED)).step_s + 5.0)


def test_a_call_and_a_record_cost_what_they_cost():
    plain, costly = simulate(scene(COLOCATED)).step_s, simulate(scene(COLOCATED, record_s=0.5)).step_s
    assert costly == pytest.approx(plain + 0.5)
    assert simulate(scene(COLOCATED, call_s=0.01)).step_s > plain + 0.05


def test_prompts_that_are_not_worth_training_are_replaced():
    plain, dropping = (simulate(scene(APART, 1, dropped=share, steps=30)) for share in (0.0, 0.5))
    assert dropping.step_s > 1.3 * plain.step_s


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_runs_to_its_end(algorithm: str):
    pools = {**COLOCATED, "cost": "main", "cost_critic": "main"}
    assert simulate(scene(pools, 1, algorithm, steps=5)).step_s > GENERATE


@given(
    pools=st.sampled_from([COLOCATED, SPLIT, APART]),
    staleness=st.integers(0, 3),
    tail=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    firing=st.integers(1, 8),
    mailbox=st.integers(1, 8),
    whole=st.booleans(),
)
@settings(max_examples=60)
def test_no_run_stops_and_no_sample_is_older_than_the_bound(
    pools: dict[str, str], staleness: int, tail: list[int], firing: int, mailbox: int, whole: bool
):
    lengths = Lengths.measured(tail)
    found = simulate(
        scene(
            pools, staleness, steps=7, response=lengths, firing_rows=firing, mailbox_rows=mailbox, whole_batches=whole
        )
    )
    assert len(found.steps_s) == 7
    assert max(found.staleness) <= staleness
    assert sum(found.staleness.values()) == pytest.approx(1)
    assert all(0 <= idle <= 1 for idle in found.pool_idle.values())


def test_the_runs_own_admission_decides(monkeypatch: pytest.MonkeyPatch):
    """The simulator uses the run's admission rule: a budget of one prompt changes its times."""
    room = Admission.room
    monkeypatch.setattr(Admission, "room", lambda self: min(1, room(self)) if not self.incomplete else 0)
    one_by_one = simulate(scene(APART)).step_s
    assert one_by_one == pytest.approx(2 * (GENERATE + INFER) + POLICY)


def test_a_run_that_can_not_go_on_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Admission, "room", lambda self: 1 - self.live)
    with pytest.raises(Refused, match="the simulated run stops after 0 of 12 steps"):
        simulate(scene(APART))


def test_the_same_scenario_gives_the_same_times():
    tailed = scene(SPLIT, 2, response=Lengths((3.0, 16.0, 40.0)), whole_batches=False)
    assert simulate(tailed).steps_s == simulate(tailed).steps_s
    assert simulate(msgspec.structs.replace(tailed, seed=1)).steps_s != simulate(tailed).steps_s


def test_engines_share_the_rows():
    speeds = {**scene(APART).speeds, "generator": MeasuredSpeed(step_s=GENERATE / 16, engines=4, slots=1)}
    spread = simulate(scene(APART, 2, speeds=speeds, whole_batches=False))
    alone = {**speeds, "generator": MeasuredSpeed(step_s=GENERATE / 16, engines=1, slots=1)}
    assert spread.step_s == pytest.approx(GENERATE)
    assert simulate(scene(APART, 2, speeds=alone, whole_batches=False)).step_s == pytest.approx(4 * GENERATE)


def test_what_was_under_way_at_the_end_is_let_go_of_in_silence(monkeypatch: pytest.MonkeyPatch):
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda trouble: said.append(trouble.exc_value))
    for pools in (COLOCATED, APART):
        simulate(scene(pools, 1, whole_batches=False))
        gc.collect()
    assert said == []
