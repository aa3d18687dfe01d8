"""From a recipe to service specs: the services, their pools, and the edges between their stages."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from asyncflow.dataflow.algorithms.dapo import dapo
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.algorithms.safe_rlhf import safe_rlhf
from asyncflow.dataflow.graph import Dataflow
from asyncflow.dataflow.trace import Flow, trace
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.evaluations import EVALUATOR
from asyncflow.recipe.model_checks import check_placement, check_roles
from asyncflow.recipe.service_specs import (
    ADVANTAGE,
    GENERATOR,
    NO_DEVICE,
    compose,
    pools_of,
    replaceable,
    stateful,
)
from asyncflow.services.ranks.spec import ModelSettings, ServiceSpec
from protocols.data.messages import Experience, Rollouts, Scores
from protocols.layout.topology import Topology
from protocols.roles import ROLES, Policy, Reward, Sampling
from tests.asyncflow.conftest import MakeRecipe
from workers.settings import Model

DATAFLOW = trace(ppo)
SPLIT = {
    "pools": {"train": {"devices": 1}, "rollout": {"devices": 1}},
    "placement": {"policy": {"pool": "train"}, "generator": {"pool": "rollout"}, "reward": {"pool": "rollout"}},
}


def composed(recipe: Recipe, dataflow: Dataflow = DATAFLOW) -> dict[str, ServiceSpec]:
    return {s.name: s for s in compose(recipe, dataflow, "run", 2, "/logs")}


def model_of(spec: ServiceSpec) -> Model:
    assert isinstance(spec.settings, ModelSettings)
    return spec.settings.model


def test_without_a_generator_the_policy_generates(make_recipe: MakeRecipe):
    services = composed(make_recipe())
    assert list(services) == ["policy", "reference", "critic", "reward", ADVANTAGE, EVALUATOR]
    policy = services["policy"]
    assert [(s.name, s.fires) for s in policy.stages] == [
        ("policy.generate#1", "generate"),
        ("policy.update#1", "batch"),
    ]
    assert policy.stages[0].sampling == Sampling(max_tokens=6, temperature=1.0)
    assert (policy.term, policy.run, policy.log_path) == (2, "run", "/logs/policy.log")


def test_a_generator_takes_over_what_draws_and_nothing_else(make_recipe: MakeRecipe):
    services = composed(make_recipe(**SPLIT))
    assert [s.name for s in services[GENERATOR].stages] == ["policy.generate#1"]
    assert [s.name for s in services["policy"].stages] == ["policy.update#1"]
    assert model_of(services[GENERATOR]).path == model_of(services["policy"]).path


def test_every_output_goes_to_an_input_that_its_service_has(make_recipe: MakeRecipe):
    for recipe in (make_recipe(), make_recipe(**SPLIT)):
        services = composed(recipe)
        sent = [t for s in services.values() for stage in s.stages for t in stage.outputs]
        inputs = {(s.name, edge) for s in services.values() for stage in s.stages for edge in stage.inputs}
        from_prompts = {(GENERATOR if GENERATOR in services else "policy", "policy.generate#1.0")}
        assert {(t.service, t.edge) for t in sent} == inputs - from_prompts
        assert len(sent) == len(inputs) - 1, "one producer an edge"


def test_the_batch_goes_to_both_trainers(make_recipe: MakeRecipe):
    (closing,) = composed(make_recipe())[ADVANTAGE].stages
    assert closing.fires == "closed"
    assert [(t.service, t.edge) for t in closing.outputs] == [
        ("critic", "critic.update#1.0"),
        ("policy", "policy.update#1.0"),
    ]
    assert closing.sources == ["policy.generate#1", "reference.log_probs#1", "critic.values#1", "reward.score#1"]


def test_services_of_one_pool_share_it_and_those_alone_take_no_lease(make_recipe: MakeRecipe):
    leased = {n: s.leased for n, s in composed(make_recipe(**SPLIT)).items()}
    assert leased == {
        "policy": True,
        "generator": True,
        "reference": True,
        "critic": True,
        "reward": True,
        ADVANTAGE: False,
        EVALUATOR: False,
    }
    alone = make_recipe(**SPLIT, models={"reward": {"rule": "exact_match"}})
    assert composed(alone)[GENERATOR].leased is False


def test_what_is_not_placed_goes_to_the_first_pool_and_rules_need_none(make_recipe: MakeRecipe):
    recipe = make_recipe(**SPLIT, models={"reward": {"rule": "exact_match"}})
    assert pools_of(recipe, DATAFLOW) == {
        "policy": "train",
        "reference": "train",
        "critic": "train",
        "reward": NO_DEVICE,
        GENERATOR: "rollout",
        ADVANTAGE: NO_DEVICE,
        EVALUATOR: NO_DEVICE,
    }


def test_a_mix_of_rules_needs_no_device_and_one_with_a_model_does(make_recipe: MakeRecipe):
    rules = [{"name": "right", "rule": "exact_match"}, {"name": "begun", "rule": "prefix_match"}]
    model = {"name": "liked", "path": "models/reward"}
    alone, both = (composed(make_recipe(models={"reward": {"mix": mix}})) for mix in (rules, [*rules, model]))
    assert (alone["reward"].pool, both["reward"].pool) == (NO_DEVICE, "main")


def test_an_evaluator_is_there_where_something_is_held_out(make_recipe: MakeRecipe):
    assert model_of(composed(make_recipe())[EVALUATOR]).rule == "exact_match"
    assert EVALUATOR not in composed(make_recipe(data={"eval": ""}))


def test_a_model_is_spread_over_as_many_ranks_as_its_placement_says(make_recipe: MakeRecipe):
    pools = {"main": {"devices": 1}, "frozen": {"devices": 4}}
    services = composed(make_recipe(pools=pools, placement={"reference": {"pool": "frozen", "parallel": "1-1-4"}}))
    assert {name: s.topology for name, s in services.items() if s.topology.world_size > 1} == {
        "reference": Topology(1, 1, 4)
    }
    (log_probs,) = services["reference"].stages
    assert (log_probs.protocol, log_probs.balance) == ("3D_PROTO", "tokens")


def test_ranks_that_share_a_model_or_train_one_work_together(make_recipe: MakeRecipe):
    pools = {"main": {"devices": 4}}
    parallel = {"policy": "1-2-2", "critic": "1-1-2", "reference": "2-1-1", "reward": "1-1-4"}
    placement: dict[str, dict[str, str]] = {s: {"pool": "main", "parallel": p} for s, p in parallel.items()}
    placement["policy"]["generation"] = "1-1"
    services = composed(make_recipe(pools=pools, placement=placement))
    assert {s: services[s].collective for s in parallel} == {
        "policy": True,
        "critic": True,
        "reference": True,
        "reward": False,
    }
    assert (services["policy"].topology, services["policy"].generation_layout) == (Topology(1, 2, 2), Topology(1, 1))
    assert services["critic"].backend == "3d"


@pytest.mark.parametrize("role", ["reference", "reward"])
def test_ranks_that_divide_a_frozen_model_work_together(make_recipe: MakeRecipe, role: str):
    placement = {role: {"pool": "main", "parallel": "1-1-2", "backend": "fsdp"}}
    service = composed(make_recipe(pools={"main": {"devices": 2}}, placement=placement))[role]
    assert (service.backend, service.collective) == ("fsdp", True)


def test_a_policy_with_a_vllm_of_its_own_works_as_ranks_that_work_together_do_alone_too(make_recipe: MakeRecipe):
    assert composed(make_recipe(generation={"engine": "vllm"}))["policy"].collective
    assert not composed(make_recipe(generation={"engine": "vllm"}, **SPLIT))["policy"].collective
    assert not composed(make_recipe())["policy"].collective


def test_ranks_generate_as_they_train_unless_their_placement_says_otherwise(make_recipe: MakeRecipe):
    placement = {"policy": {"pool": "main", "parallel": "2-2-1"}}
    services = composed(make_recipe(pools={"main": {"devices": 4}}, placement=placement))
    assert services["policy"].generation_layout == Topology(2, 2)
    assert composed(make_recipe())["policy"].generation_layout == Topology(1, 1)


def test_the_rows_of_a_reward_model_go_to_all_ranks_that_share_it(make_recipe: MakeRecipe):
    def protocol_of(parallel: str) -> str:
        placement = {"reward": {"pool": "main", "parallel": parallel}}
        (score,) = composed(make_recipe(pools={"main": {"devices": 4}}, placement=placement))["reward"].stages
        return score.protocol

    assert (protocol_of("1-1-4"), protocol_of("1-2-2"), protocol_of("2-1-2")) == ("DP_PROTO", "3D_PROTO", "3D_PROTO")


def test_a_mailbox_holds_one_step_unless_the_recipe_says_otherwise(make_recipe: MakeRecipe):
    assert composed(make_recipe())["reward"].limits.mailbox_rows == 8
    assert composed(make_recipe(mailbox_rows=3))["reward"].limits.mailbox_rows == 3


def test_delays_reach_their_service_alone(make_recipe: MakeRecipe):
    services = composed(make_recipe(delays={"reward": {"score": 0.5}}))
    assert {n: s.delay_seconds for n, s in services.items() if s.delay_seconds} == {"reward": {"score": 0.5}}


def test_a_checkpoint_holds_what_trains_and_what_a_batch_function_carries():
    assert stateful(DATAFLOW) == ["critic", "policy"]
    assert stateful(trace(safe_rlhf)) == ["critic", "cost_critic", "policy", ADVANTAGE]


def safe_recipe(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    path = make_recipe().models["policy"].path
    models = {"cost": {"path": path}, "cost_critic": {"path": path, "learning_rate": 1e-3}}
    return make_recipe(algorithm="safe_rlhf", models=models, advantage={"kl_coefficient": 0.1}, **changes)


def test_a_cost_and_its_critic_are_services_of_their_own_roles(make_recipe: MakeRecipe):
    services = composed(safe_recipe(make_recipe), trace(safe_rlhf))
    found = {name: service.role for name, service in services.items() if name.startswith(("c", "re"))}
    assert found == {
        "critic": "critic",
        "cost_critic": "cost_critic",
        "reference": "reference",
        "reward": "reward",
        "cost": "cost",
    }
    (score,) = services["cost"].stages
    assert [(target.service, target.edge) for target in score.outputs] == [(ADVANTAGE, "safe_rlhf#1.5")]


def test_a_cost_may_have_several_ranks_and_a_successor(make_recipe: MakeRecipe):
    pools = {"main": {"devices": 1}, "frozen": {"devices": 2}}
    recipe = safe_recipe(make_recipe, pools=pools, placement={"cost": {"pool": "frozen", "parallel": "1-1-2"}})
    check_placement(recipe, trace(safe_rlhf))
    assert composed(recipe, trace(safe_rlhf))["cost"].topology == Topology(1, 1, 2)
    assert replaceable(recipe, trace(safe_rlhf)) == ["reference", "reward", "cost", "evaluator"]


def test_what_trains_nothing_may_be_replaced_also_the_join_where_it_carries_no_state(make_recipe: MakeRecipe):
    """The multiplier of safe_rlhf is state: it would be lost with its process."""
    placement = {"generator": {"pool": "rollout"}}
    recipe = make_recipe(pools={"main": {}, "rollout": {}}, placement=placement, deterministic=False)
    assert replaceable(recipe, trace(ppo)) == ["reference", "reward", "generator", "advantage", "evaluator"]
    assert "advantage" not in replaceable(safe_recipe(make_recipe), trace(safe_rlhf))


def test_the_stage_that_closes_a_batch_knows_its_filter(make_recipe: MakeRecipe):
    (closing,) = composed(make_recipe(algorithm="dapo"), trace(dapo))[ADVANTAGE].stages
    assert (closing.filter, closing.filter_inputs) == ("trainable_groups", [1])
    (whole,) = composed(make_recipe())[ADVANTAGE].stages
    assert (whole.filter, whole.filter_inputs) == ("", [])


def test_a_role_that_no_service_runs_is_refused(make_recipe: MakeRecipe):
    def advantage(rollouts: Rollouts, scores: Scores) -> Experience:
        raise NotImplementedError

    def scored(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.policy.update(flow.join(rollouts, flow.scorer.score(rollouts)).apply(advantage))

    dataflow = trace(scored, ROLES | {"scorer": Reward, "policy": Policy})
    with pytest.raises(BadInput, match="calls the role 'scorer', which this version does not run"):
        check_roles(make_recipe(), dataflow)


def test_a_spec_with_the_settings_of_any_role_crosses_processes_unchanged(make_recipe: MakeRecipe):
    outside = make_recipe(models={"reward": {"outside": True}}, **SPLIT)
    for services in (composed(safe_recipe(make_recipe), trace(safe_rlhf)), composed(outside)):
        for spec in services.values():
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ServiceSpec) == spec
