"""A plan reports the chosen placement, its costs, the runner-up and the gain from more devices."""

from __future__ import annotations

import msgspec
import pytest

from asyncflow.planner.costs.devices import Cluster, Refused
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import Lengths, ppo
from asyncflow.planner.search.mapper import STAGES
from asyncflow.planner.search.plan import Placement, Plan, PlannedPool, format_plan, make_plan, why
from tests.asyncflow.planner.search.paper_setting import WORKLOAD


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(ppo(LLAMA["7B"]), Cluster.parse("16xA100-80G"), WORKLOAD)


def test_every_model_is_placed_once_within_the_devices(plan: Plan):
    pools = plan.chosen.pools
    assert sorted(m.role for pool in pools for m in pool.models) == ["critic", "policy", "reference", "reward"]
    assert sum(pool.devices for pool in pools) <= 16
    assert all(0 < pool.peak_gb <= plan.usable_gb for pool in pools)


def test_times_add_up_over_pools_and_stages(plan: Plan):
    for placement in filter(None, (plan.chosen, plan.runner_up)):
        assert placement.step_s == pytest.approx(sum(placement.stage_s.values()))
        for stage, seconds in placement.stage_s.items():
            slowest = max(sum(m.stage_s[stage] for m in pool.models) for pool in placement.pools)
            assert seconds == pytest.approx(slowest)


def test_the_runner_up_is_another_placement_and_slower(plan: Plan):
    assert plan.runner_up
    assert plan.runner_up.step_s >= plan.chosen.step_s
    assert plan.runner_up.name != plan.chosen.name
    assert "longer" in plan.reason


def test_further_devices_never_cost_time(plan: Plan):
    assert sorted(plan.with_more) == [1, 8]
    assert plan.chosen.step_s >= plan.with_more[1] >= plan.with_more[8]
    alone = make_plan(ppo(LLAMA["7B"]), Cluster.parse("24xA100-80G"), WORKLOAD)
    assert plan.with_more[8] == pytest.approx(alone.chosen.step_s)


def test_the_bound_is_beaten_by_nobody_and_is_no_empty_promise(plan: Plan):
    assert plan.chosen.step_s / 2 <= plan.bound_s <= plan.chosen.step_s


def test_the_plan_is_printed_with_its_numbers(plan: Plan):
    text = format_plan(plan)
    assert text.startswith("16xA100-80G, synchronous: ")
    for role in ("policy", "critic", "reference", "reward"):
        assert f"|  {role}" in text
    assert "runner-up: " in text and "% slower: " in text
    assert "8 more devices would save" in text and "bound: no placement takes less than" in text


def test_the_plan_travels_as_json(plan: Plan):
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_long_tails_and_staleness_put_generation_on_devices_of_its_own():
    work = msgspec.structs.replace(WORKLOAD, response=Lengths.long_tailed(400, 0.8, 2048), mini_batches=1, staleness=2)
    plan = make_plan(ppo(LLAMA["7B"]), Cluster.parse("32xA100-80G"), work)
    assert plan.staleness == 2 and "staleness 2" in format_plan(plan)
    assert any(m.role == "generator" for pool in plan.chosen.pools for m in pool.models)


def test_what_cannot_be_placed_is_refused_with_the_numbers():
    with pytest.raises(Refused, match=r"llama-70B.* GB a device .*weights.* of 72\.0 GB usable"):
        make_plan(ppo(LLAMA["70B"]), Cluster.parse("8xA100-80G"), WORKLOAD)


def test_why_names_the_stages_and_the_busy_pool():
    def placement(seconds: tuple[float, float, float], busy: tuple[float, ...], step: float) -> Placement:
        stages: dict[str, float] = dict(zip(STAGES, seconds, strict=True))
        return Placement(step, stages, tuple(PlannedPool(8, one, 10.0, ()) for one in busy))

    best = placement((10, 2, 8), (20,), 20)
    assert why(best, placement((15, 2, 6), (15, 8), 23)) == "generation takes 5 s longer; training 2 s shorter"
    assert "its busiest pool" in why(best, placement((10, 2, 9), (21, 3), 21))
