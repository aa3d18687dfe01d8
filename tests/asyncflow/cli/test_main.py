"""The command line: bad input gives one clear line and exit code 2, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncflow.cli.main import app
from asyncflow.recipe.config import recipe_text
from tests.asyncflow.conftest import MakeRecipe

ROOT = Path(__file__).parents[3]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def asyncflow(tmp_path: Path) -> Command:
    """The installed command, in an empty folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / "asyncflow"), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(make_recipe()))
    return path


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines() == [f"error: {message}"]
    assert result.stdout == ""


def test_validate_prints_the_resolved_recipe_which_is_a_recipe(asyncflow: Command, recipe: Path):
    result = asyncflow("validate", recipe, "--resolved", "--set", "steps=9", "--set", "loss.clip_low=0.1")
    assert (result.returncode, result.stderr) == (0, "")
    table = tomllib.loads(result.stdout)
    assert (table["steps"], table["loss"]["clip_low"], table["checkpoints"]["keep"]) == (9, 0.1, 2)


def test_validate_says_valid_who_runs_where_and_the_memory(asyncflow: Command, recipe: Path):
    result = asyncflow("validate", recipe)
    assert (result.returncode, result.stderr) == (0, "")
    first, *lines = result.stdout.splitlines()
    assert first == f"{recipe} is valid: ppo, 5 steps of 4 prompts x 2 samples, synchronous"
    assert any(line.split()[:5] == ["critic", "policy", "main", "1", "weights"] for line in lines)
    assert any(line.startswith("pool main: 1 x ") and line.endswith("on each") for line in lines)


def test_relative_paths_start_at_the_working_directory_wherever_the_recipe_is(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, elsewhere = tmp_path / "my place", tmp_path / "my recipes"
    place.mkdir()
    elsewhere.mkdir()
    shutil.copy(data / "train.jsonl", place / "my rows.jsonl")
    shutil.copy(recipe, elsewhere / "first try.toml")
    monkeypatch.chdir(place)
    arguments = ["validate", "../my recipes/first try.toml", "--resolved", "--set", "data.train=my rows.jsonl"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert tomllib.loads(result.stdout)["data"]["train"] == str(place / "my rows.jsonl")


def test_plan_draws_the_dataflow_and_says_who_runs_where(asyncflow: Command, recipe: Path):
    result = asyncflow("plan", recipe)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["policy", "policy", "pool", "main,", "shared"] in lines
    assert ["advantage", "advantage", "no", "device"] in lines
    assert any(line[0] == "gae#1" for line in lines)


def test_plan_on_devices_draws_the_best_placement_of_the_recipes_models(asyncflow: Command, recipe: Path):
    result = asyncflow("plan", recipe, "--devices", "2xcpu-slot")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("2xcpu-slot, synchronous: ")
    placed = json.loads(asyncflow("plan", recipe, "--devices", "2xcpu-slot", "--json").stdout)
    assert {"policy", "critic"} <= {model["role"] for pool in placed["chosen"]["pools"] for model in pool["models"]}


def test_plan_refuses_devices_that_it_does_not_know(asyncflow: Command, recipe: Path):
    result = asyncflow("plan", recipe, "--devices", "8xTPU")
    known = "A100-80G, H100, H200, MI300X, cpu-slot"
    assert_refused(result, f"devices '8xTPU': write COUNTxDEVICE, e.g. 128xA100-80G; know {known}")
    assert_refused(
        asyncflow("plan", recipe, "--json"),
        "--json prints the placement on devices: give them too, e.g. --devices 128xA100-80G",
    )


def test_a_run_that_can_not_start_leaves_nothing_behind(asyncflow: Command, recipe: Path, tmp_path: Path):
    result = asyncflow("run", recipe, "--set", "models.critic.path=nowhere")
    assert_refused(result, f"models.critic.path: no folder {tmp_path / 'nowhere'}")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_key_is_told_the_nearest(asyncflow: Command, recipe: Path):
    result = asyncflow("validate", recipe, "--set", "generation.max_token=3")
    assert_refused(result, f"{recipe}: unknown key generation.max_token, did you mean 'max_tokens'?")


def test_a_message_with_brackets_is_printed_as_it_is(asyncflow: Command, tmp_path: Path):
    """Square brackets are markup for the console, but may occur in a path."""
    path = tmp_path / "[red]recipe.toml"
    assert_refused(asyncflow("plan", path), f"recipe {path}: can't be read: No such file or directory")


def test_what_is_no_run_can_not_be_resumed(asyncflow: Command, tmp_path: Path):
    assert_refused(asyncflow("resume", tmp_path), f"{tmp_path} is no run folder: it has no recipe.toml")
