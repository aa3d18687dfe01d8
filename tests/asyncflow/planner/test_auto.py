"""`placement = "auto"` chooses the fastest simulated placement, and the choice can be saved, edited and loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncflow.planner.auto import PlacementChoice, bound_s, place
from asyncflow.planner.calibration.calibration import Calibration
from asyncflow.planner.candidates import runs
from asyncflow.planner.costs.devices import CATALOGUE
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import Lengths, ModelWork
from asyncflow.planner.plan_file import text_of, with_saved_plan
from asyncflow.planner.simulation.scenarios import of_recipe
from asyncflow.planner.simulation.simulator import simulate
from asyncflow.recipe.config import BadInput, Pool, Recipe, load_recipe, recipe_text, to_recipe
from asyncflow.run.launch import launch
from asyncflow.run.prepare import prepare
from asyncflow.services.runtime import SLOTS_PER_CORE
from protocols.layout.topology import Topology
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.planner.scenes import APART, COLOCATED, SPLIT, scene
from workers.settings import Lora

TWO_CORES = msgspec.structs.replace(CATALOGUE["cpu-slot"], cores=2.0)
LONG = Calibration(TWO_CORES, Lengths.long_tailed(20, 0.8, 60))


def chosen(recipe: Recipe, calibration: Calibration | None = LONG) -> PlacementChoice:
    return place(recipe, prepare(msgspec.structs.replace(recipe, placed_by="", pools={"main": Pool()})).dataflow,
                 Lengths.fixed(8), calibration)  # fmt: skip


@pytest.fixture
def asynchronous(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(deterministic=False, staleness=1, placement="auto", pools={"main": {"devices": 4}})


def test_auto_becomes_pools_and_a_placement_that_the_checks_pass(make_recipe: MakeRecipe):
    checked = prepare(make_recipe(deterministic=False, placement="auto"))
    assert checked.recipe.placed_by == ""
    assert {"policy", "critic", "reference", "reward"} <= set(checked.recipe.placement)
    assert all(placed.pool in checked.recipe.pools for placed in checked.recipe.placement.values())
    assert to_recipe(msgspec.to_builtins(checked.recipe)).placement == checked.recipe.placement


def test_the_choice_is_never_behind_what_one_makes_by_hand(asynchronous: Recipe):
    choice = chosen(asynchronous)
    dataflow = prepare(msgspec.structs.replace(asynchronous, placed_by="", pools={"main": Pool()})).dataflow
    for pools in (COLOCATED, SPLIT, APART):
        by_hand = msgspec.structs.replace(
            asynchronous,
            pools={pool: Pool() for pool in set(pools.values())},
            placement={s: msgspec.convert({"pool": p}, type(choice.chosen.recipe.placement["policy"]))
                       for s, p in pools.items()},
        )  # fmt: skip
        step_s = simulate(of_recipe(by_hand, dataflow, Lengths.fixed(8), LONG)).step_s
        assert choice.chosen.simulated.step_s <= 1.05 * step_s


def test_no_more_pools_than_there_are_slots(asynchronous: Recipe):
    for slots in (1, 2, 3):
        choice = chosen(msgspec.structs.replace(asynchronous, pools={"main": Pool(slots)}))
        assert sum(pool.devices for pool in choice.chosen.recipe.pools.values()) <= slots
    assert choice.devices == "3xcpu-slot"


def test_without_pools_the_slots_are_those_of_this_machine(asynchronous: Recipe):
    choice = chosen(msgspec.structs.replace(asynchronous, pools={}))
    assert choice.devices == f"{SLOTS_PER_CORE * (os.cpu_count() or 1)}xcpu-slot"


def test_a_bound_is_one(asynchronous: Recipe):
    for pools in (COLOCATED, SPLIT, APART):
        for staleness in (0, 1, 2):
            for cores in (0.0, 1.0, 2.0):
                made = scene(pools, staleness, cores=cores)
                assert bound_s(made) <= simulate(made).step_s * (1 + 1e-9)


def test_a_saved_plan_is_pinned_as_it_was_or_as_it_was_edited(asynchronous: Recipe, tmp_path: Path):
    choice = chosen(asynchronous)
    file = tmp_path / "plan.toml"
    file.write_text(text_of(choice))
    again = with_saved_plan(msgspec.structs.replace(asynchronous, placed_by=str(file)), str(file))
    assert (again.pools, again.placement) == (choice.chosen.recipe.pools, choice.chosen.recipe.placement)
    file.write_text('[pools.mine]\ndevices = 1\n[placement.policy]\npool = "mine"\n')
    assert prepare(msgspec.structs.replace(asynchronous, placed_by=str(file))).recipe.pools == {"mine": Pool()}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "neither 'auto' nor a plan file: No such file"), ("pools = 3", "Expected `object`"), ("][", "Invalid")],
)
def test_a_plan_that_can_not_be_read_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, text: str | None, message: str
):
    file = tmp_path / "plan.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=message):
        prepare(make_recipe(placement=str(file)))


def test_models_that_fit_nowhere_are_refused_with_the_numbers(asynchronous: Recipe):
    tiny = msgspec.structs.replace(CATALOGUE["A100-80G"], memory_bytes=1e6)
    with pytest.raises(BadInput, match=r"placement = 'auto': .*does not fit on 4xA100-80G.* GB a device"):
        chosen(asynchronous, Calibration(tiny))


def test_pools_of_two_kinds_keep_their_devices(asynchronous: Recipe):
    pools = {"a": Pool(2, "A100-80G"), "b": Pool(3, "H100")}
    choice = chosen(msgspec.structs.replace(asynchronous, runtime="ray", pools=pools), None)
    assert choice.devices == "2xA100-80G + 3xH100"
    taken = {"A100-80G": 0, "H100": 0}
    for pool in choice.chosen.recipe.pools.values():
        taken[pool.device] += pool.devices
    assert taken["A100-80G"] <= 2 and taken["H100"] <= 3


def test_cpu_slots_are_mapped_alone(asynchronous: Recipe):
    mixed = {"a": Pool(1, "cpu-slot"), "b": Pool(1, "H100")}
    with pytest.raises(BadInput, match=r"CPU slots .* can't be mixed with other devices, .* 1xcpu-slot, 1xH100"):
        chosen(msgspec.structs.replace(asynchronous, pools=mixed), None)


def test_on_accelerators_the_mapper_proposes_and_the_checks_dispose(asynchronous: Recipe):
    choice = chosen(
        msgspec.structs.replace(asynchronous, runtime="ray", pools={"main": Pool(8, "A100-80G")}),
        Calibration(CATALOGUE["A100-80G"]),
    )
    assert sum(pool.devices for pool in choice.chosen.recipe.pools.values()) <= 8
    assert {pool.device for pool in choice.chosen.recipe.pools.values()} == {"A100-80G"}
    generator = choice.chosen.recipe.placement.get("generator")
    assert generator is None or generator.parallel == "1-1-1"


def test_a_policy_with_adapters_trains_on_replicas_beside_a_generator_or_on_one_rank(asynchronous: Recipe):
    """Adapters train on ranks that hold the whole model, and generate there on one rank only."""
    models, pools = asynchronous.models, {"main": Pool(8, "A100-80G")}
    whole = msgspec.structs.replace(asynchronous, runtime="ray", pools=pools)
    adapted = models | {"policy": msgspec.structs.replace(models["policy"], lora=Lora(rank=4))}
    recipe = msgspec.structs.replace(whole, models=adapted)
    trained = ModelWork("policy", LLAMA["7B"], trains=True)
    hybrid = msgspec.structs.replace(trained, generates=1)
    replicas, cut = Layout(Topology(1, 1, 4)), Layout(Topology(1, 2, 2))
    assert runs(recipe, trained, replicas) and runs(recipe, hybrid, Layout(Topology()))
    assert not (runs(recipe, hybrid, replicas) or runs(recipe, trained, cut) or runs(recipe, hybrid, cut))
    assert runs(whole, hybrid, replicas) and runs(whole, hybrid, cut)
    placed = chosen(recipe, Calibration(CATALOGUE["A100-80G"])).chosen.recipe
    prepare(placed)  # passes the checks of a run


def test_adapters_that_vllm_generates_with_get_a_generator_of_their_own(table: dict[str, Any]):
    """A vLLM beside the policy takes no adapters. Only the placement that is found can be checked for that."""
    table["models"]["policy"] = {**table["models"]["policy"], "lora": {"rank": 4}}
    changes = {"deterministic": False, "placement": "auto", "generation": {"engine": "vllm"}}
    placed = prepare(to_recipe(table | changes | {"pools": {"main": {"devices": 4}}})).recipe.placement
    assert placed["generator"].pool != placed["policy"].pool
    with pytest.raises(BadInput, match="this version runs no placement"):
        prepare(to_recipe(table | changes | {"pools": {"main": {"devices": 1}}}))


def test_replicas_that_train_divide_their_optimizer_state_as_the_memory_model_assumes(asynchronous: Recipe):
    recipe = msgspec.structs.replace(asynchronous, runtime="ray", pools={"main": Pool(8, "A100-80G")})
    placement = chosen(recipe, Calibration(CATALOGUE["A100-80G"])).chosen.recipe.placement
    replicated = {role: Topology.parse(placed.parallel).dp > 1 for role, placed in placement.items()}
    assert replicated["policy"] or replicated["critic"]
    for role, placed in placement.items():
        assert (placed.backend == "zero1") == (replicated[role] and role in ("policy", "critic"))


def test_a_resolved_recipe_reads_back(make_recipe: MakeRecipe, tmp_path: Path):
    resolved = prepare(make_recipe(deterministic=False, placement="auto")).recipe
    (tmp_path / "recipe.toml").write_text(recipe_text(resolved))
    assert load_recipe(tmp_path / "recipe.toml") == resolved


def test_a_device_that_nobody_knows_is_refused_before_anything_starts(make_recipe: MakeRecipe):
    with pytest.raises(BadInput, match=r"pools.main: device '.*/H999': no file .*and no device of A100-80G, H100"):
        prepare(make_recipe(pools={"main": {"device": "H999"}}))


def test_a_calibrations_file_stands_for_its_device(make_recipe: MakeRecipe, tmp_path: Path):
    file = tmp_path / "here.json"
    file.write_bytes(msgspec.json.encode(LONG))
    changes = {"deterministic": False, "placement": "auto", "pools": {"main": {"devices": 2, "device": str(file)}}}
    checked = prepare(make_recipe(**changes))
    assert {pool.device for pool in checked.recipe.pools.values()} == {"cpu-slot"}
    assert sum(pool.devices for pool in checked.recipe.pools.values()) <= 2


async def test_a_run_keeps_the_plan_that_was_made_for_it(make_recipe: MakeRecipe, tmp_path: Path):
    recipe = make_recipe(deterministic=False, placement="auto", steps=1)
    async with launch(recipe, folder=tmp_path / "run") as run:
        assert (await run.wait()).outcome == "finished"
    kept = with_saved_plan(recipe, str(tmp_path / "run" / "plan.toml"))
    resolved = load_recipe(tmp_path / "run" / "recipe.toml")
    assert (resolved.pools, resolved.placement, resolved.placed_by) == (kept.pools, kept.placement, "")
