"""`plan` and `calibrate` as their user reads them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from asyncflow.cli import plans
from asyncflow.planner.calibration import machine
from asyncflow.planner.calibration.calibration import Calibration
from asyncflow.planner.costs.devices import CATALOGUE
from asyncflow.planner.costs.workload import Lengths
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.run.prepare import prepare
from tests.asyncflow.conftest import MakeRecipe


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(deterministic=False)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A calibration file."""
    two_cores = msgspec.structs.replace(CATALOGUE["cpu-slot"], cores=2.0)
    path = tmp_path / "here.json"
    path.write_bytes(msgspec.json.encode(Calibration(two_cores, Lengths.fixed(4), 4, {}, "a test")))
    return path


def test_a_recipes_own_placement_is_simulated_on_a_calibrated_device(recipe: Recipe, device: Path):
    *_, last = plans.dataflow(prepare(recipe), str(device))
    assert last.startswith("simulated: ") and "s a step; idle: main " in last and "versions old: 100% at 0" in last
    assert "simulated" not in "\n".join(plans.dataflow(prepare(recipe), "")), "nothing is known of the devices"


def test_the_simulated_step_stands_beside_the_analytic_one(recipe: Recipe):
    analytic, simulated, runner_up = plans.placement(prepare(recipe), "4xA100-80G", "", as_json=False)
    assert analytic.startswith("4xA100-80G, synchronous: ")
    assert simulated.startswith("simulated: ") and runner_up.startswith("the runner-up, simulated: ")
    (text,) = plans.placement(prepare(recipe), "4xA100-80G", "", as_json=True)
    fields = json.loads(text)
    assert fields["simulated"]["step_s"] == pytest.approx(fields["chosen"]["step_s"], rel=0.25)


def test_a_plan_is_saved_and_pinned(recipe: Recipe, device: Path, tmp_path: Path):
    file = tmp_path / "plan.toml"
    text = "\n".join(plans.save_plan(recipe, str(device), file))
    assert f"pin it with: placement = '{file}'" in text and "runner-up of " in text
    placed = prepare(msgspec.structs.replace(recipe, placed_by=str(file), pools={}, placement={})).recipe
    assert set(placed.placement) >= {"policy", "critic"}


def test_an_unknown_device_is_bad_input(recipe: Recipe):
    with pytest.raises(BadInput, match=r"device .nowhere\.json.: no file"):
        list(plans.dataflow(prepare(recipe), "nowhere.json"))


def test_two_kinds_of_devices_contradict_each_other(recipe: Recipe):
    with pytest.raises(BadInput, match="--devices 8xH100 is of H100, --device says A100-80G: give --devices"):
        plans.placement(prepare(recipe), "8xH100", "A100-80G", as_json=False)


def test_advice_from_the_folder_of_an_older_run_names_its_format(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text("a_key_of_another_time = 1")
    with pytest.raises(BadInput, match="was written by an older asyncflow"):
        plans.advise(tmp_path, as_json=False)


def test_calibrate_measures_the_recipes_own_models(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quickest = machine.CalibrationSizes(
        rows=(1, 8), trained_rows=(2, 8), contention_rows=4, running=(1, 8), rounds=1, calls=3, seconds=0.05
    )
    monkeypatch.setattr(machine, "QUICK", quickest)
    placement = {"policy": {"pool": "a"}, "generator": {"pool": "b"}}
    recipe = make_recipe(
        deterministic=False, pools={"a": {}, "b": {}}, placement=placement, models={"reward": {"rule": "exact_match"}}
    )
    file = tmp_path / "here.json"
    text = "\n".join(plans.calibrate(recipe, as_json=False, output=file, quick=True))
    found = msgspec.json.decode(file.read_bytes(), type=Calibration)
    reach = found.device.efficiency
    assert found.responses is not None and 1 <= found.responses.mean <= 6
    assert min(reach.publish_s, reach.call_s, reach.record_s, reach.layer_s + reach.host_step_s) > 0
    assert found.device.cores >= 1 and set(found.row_s) == {"reward", "advantage"}
    assert "GFLOP/s" in text and "a row of reward" in text
    assert any("simulated: " in line for line in plans.dataflow(prepare(recipe), str(file)))
