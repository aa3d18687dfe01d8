"""kill -9 of a whole run, at named places and at random moments: resumed, it ends like one that never died."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, recipe_text
from asyncflow.services import failpoints
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.faults.invariants import check_finished
from tests.asyncflow.pipeline.runs import ASYNCFLOW, differing, finished, weights

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

KILLS = 20
SERVICES_SECONDS, ALL_SECONDS = 60.0, 240.0  # after the controller; agents of Ray look rarely for their raylet
DEADLINE_SECONDS = 300.0  # of one start, on a busy machine
PLACES = [
    ("controller", "admitted"),
    ("policy", "generating"),
    ("policy", "generated"),
    ("reward", "taken"),
    ("reference", "computed"),
    ("advantage", "closing"),
    ("policy", "training"),
    ("policy", "trained"),
    ("critic", "trained"),
    ("controller", "committing"),
    ("policy", "checkpoint"),
    ("critic", "checkpoint"),
    ("controller", "checkpoint"),
    ("policy", "restore"),
    ("controller", "draining"),
]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe(steps=30, checkpoints={"every": 3})


def start(path: Path, folder: Path, armed: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a run, or go on with it."""
    environment = os.environ | ({failpoints.VARIABLE: str(armed)} if armed is not None else {})
    command = [*ASYNCFLOW, "run", str(path), "--folder", str(folder)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=environment)


def committed(folder: Path) -> int:
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def wait_until_moved(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until a step is committed, or a resumed run has given up those beyond its checkpoint."""
    before, deadline = committed(folder), time.monotonic() + DEADLINE_SECONDS
    while committed(folder) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


async def assert_like_undisturbed(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    whole = await finished(recipe, tmp_path / "whole")
    for role in ("policy", "critic"):
        assert differing(weights(folder, recipe.steps, role), weights(whole, recipe.steps, role)) == [], role
    print(check_finished(folder, recipe), file=sys.stderr)


async def test_a_run_that_is_killed_at_every_named_place_ends_like_one_that_was_not(recipe: Recipe, tmp_path: Path):
    path, folder, armed = tmp_path / "recipe.toml", tmp_path / "killed", tmp_path / "failpoints"
    path.write_text(recipe_text(recipe))
    armed.mkdir()
    for place in PLACES:
        process = start(path, folder, armed)
        if place[1] != "restore":  # which comes at once
            wait_until_moved(process, folder)
        waiting = failpoints.arm(armed, *place)
        if place[1] == "draining":
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL, place
        assert not waiting.exists()
    assert start(path, folder).wait(DEADLINE_SECONDS) == 0
    await assert_like_undisturbed(recipe, folder, tmp_path)


async def test_a_run_that_is_killed_at_twenty_random_moments_ends_like_one_that_was_not(recipe: Recipe, tmp_path: Path):
    seed = int(os.environ.get("ASYNCFLOW_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"\nASYNCFLOW_FAULT_SEED={seed} repeats the moments", file=sys.stderr)
    rng = random.Random(seed)
    path, folder = tmp_path / "recipe.toml", tmp_path / "killed"
    path.write_text(recipe_text(recipe))
    for number in range(KILLS):
        process = start(path, folder)
        # Most kills come while steps are made, some while the run starts.
        if rng.random() < 0.8:
            wait_until_moved(process, folder)
        time.sleep(rng.expovariate(4.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept = max([0, *(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").glob("step_*"))])
        done = committed(folder)
        print(f"kill {number + 1:2}: {done:2} steps made, {max(done - kept, 0)} of them again", file=sys.stderr)
    assert start(path, folder).wait(DEADLINE_SECONDS) == 0
    await assert_like_undisturbed(recipe, folder, tmp_path)


@pytest.mark.ray
async def test_the_services_of_a_controller_that_dies_alone_end_by_themselves_and_a_resume_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path
):
    """Only the controller's process is killed: its services on Ray have to see that it is gone."""
    recipe = make_recipe(steps=6, runtime="ray", deterministic=False, checkpoints={"every": 1})
    path, folder = tmp_path / "recipe.toml", tmp_path / "killed"
    path.write_text(recipe_text(recipe))
    process = start(path, folder)
    wait_until_moved(process, folder)
    started = psutil.Process(process.pid).children(recursive=True)
    services = [child for child in started if "ServiceActor" in " ".join(child.cmdline())]
    assert len(services) == 6, "policy, critic, reference, reward, advantage, evaluator"
    process.kill()
    process.wait()
    began = time.monotonic()
    for who, processes, seconds in (("services", services, SERVICES_SECONDS), ("processes", started, ALL_SECONDS)):
        _, alive = psutil.wait_procs(processes, timeout=seconds)
        assert alive == [], f"still there after {seconds:g} s"
        passed = time.monotonic() - began
        print(f"{len(processes)} {who} were gone {passed:.1f} s after the controller", file=sys.stderr)
    assert start(path, folder).wait(DEADLINE_SECONDS) == 0
    check_finished(folder, recipe)
