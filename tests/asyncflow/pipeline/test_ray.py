"""The pipeline on a Ray cluster: one actor per service, live metrics, the same training, and a clean shutdown."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import cast

import msgspec
import pytest
import torch
from safetensors.torch import load_file

import asyncflow
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, recipe_text
from protocols.control.events import Published, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.workers.checkpoints import trained_weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # seven processes that import torch, on a share of two cores

SPLIT = {
    "pools": {"policy": {}, "critic": {}, "rollout": {}},
    "placement": {"critic": {"pool": "critic"}, "generator": {"pool": "rollout"}},
    "deterministic": False,
    "runtime": "ray",
}


@pytest.mark.usefixtures("ray_started")
async def test_a_delayed_critic_trains_the_same_at_staleness_0(make_recipe: MakeRecipe) -> None:
    """If the version rose after the policy's update alone, step 2 would use values of the untrained critic."""
    final = []
    for delay, runtime in ((0.0, "local"), (1.0, "ray")):
        changes = {**SPLIT, "runtime": runtime, "delays": {"critic": {"update": delay}}}
        recipe = make_recipe(steps=3, data={"eval": ""}, **changes)
        async with asyncflow.launch(recipe) as run:
            ended = await run.wait()
        assert ended.outcome == "finished", ended.error
        final.append(trained_weights(run.folder / "checkpoints" / "step_000003" / "critic"))
    untrained = load_file(Path(recipe.models["critic"].path) / "model.safetensors")
    for name, tensor in final[0].items():
        torch.testing.assert_close(final[1][name], tensor, rtol=0, atol=1e-5, msg=name)
    moved = max(float((final[0][n] - t).abs().max()) for n, t in untrained.items() if n in final[0])
    assert moved > 1e-3, "the critic was hardly trained, so the comparison says nothing"


@pytest.mark.vllm
@pytest.mark.usefixtures("ray_started")
async def test_vllm_generates_in_an_actor_of_its_own(make_recipe: MakeRecipe) -> None:
    from ray.util import list_named_actors

    changes = {
        **SPLIT,
        "steps": 6,
        "staleness": 2,
        "generation": {"engine": "vllm", "kv_cache_bytes": 64 * 1024 * 1024},
    }
    actors: list[str] = []
    pages: dict[str, str] = {}
    async with asyncflow.launch(make_recipe(**changes)) as run:
        published, ages = [], []
        async for event in run.events():
            match event:
                case Published():
                    published.append(event)
                case StepCommitted():
                    ages.append(event.staleness_max)
                    if event.step == 1:
                        await run.pause()
                        actors = sorted(
                            a["name"] for a in cast(list[dict[str, str]], list_named_actors(all_namespaces=True))
                        )
                        pages = _scrape(run.folder / "metrics" / "targets.json")
                        await run.resume()
    services = ["advantage", "critic", "evaluator", "generator", "policy", "reference", "reward"]
    assert actors == [f"{run.folder.name}/{s}" for s in services]
    assert sorted(pages) == sorted([*services, "controller"])
    assert all("asyncflow_up" in page for page in pages.values())
    assert 'asyncflow_steps_total{rank="0",role="controller"} 1.0' in pages["controller"]
    assert "asyncflow_tokens_generated_total" in pages["generator"]
    assert [p.version.step for p in published] == list(range(7))
    assert max(p.receipts[0].probe_difference for p in published) < 1e-4
    assert len(ages) == 6
    assert max(ages) <= 2


def _scrape(targets: Path) -> dict[str, str]:
    """Role -> metrics page, for every endpoint that a run lists."""
    pages = {}
    for entry in msgspec.json.decode(targets.read_bytes()):
        with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=60) as answer:
            pages[entry["labels"]["role"]] = answer.read().decode()
    return pages


def test_sigterm_to_the_whole_group_saves_the_run_and_leaves_nothing_behind(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Also where that takes longer than the three seconds after which Ray's own handler would abort the process.

    As from a service manager: Ray and the actors get it too. The second one gives up the step that is training.
    """
    recipe = make_recipe(steps=10_000, checkpoints={"every": 0}, delays={"critic": {"update": 5.0}}, **SPLIT)
    folder = tmp_path / "run"
    process = _start(recipe, folder, tmp_path)
    try:
        _wait_for_steps(process, folder, 1)
        members = _session_members(process.pid)
        assert len(members) > 5, "the actors run in the session of the command"
        shared = _shared_memory(members)
        os.killpg(process.pid, signal.SIGTERM)
        _wait_for(folder / "logs" / "controller.log", "draining")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=150) == 0
    finally:
        process.kill()
    assert list((folder / "checkpoints").glob("step_*/manifest.json"))
    assert _gone(members), f"still running: {[p for p in members if Path(f'/proc/{p}').exists()]}"
    assert not [path for path in shared if path.exists()]


def _start(recipe: Recipe, folder: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(recipe))
    command = [sys.executable, "-m", "asyncflow.cli.main", "run", str(path), "--folder", str(folder)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def _wait_for_steps(process: subprocess.Popen[bytes], folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 400
    while len(read_lines(folder / "metrics.jsonl")) < steps:
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, f"step {steps} was not reached"
        time.sleep(0.1)


def _wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in log.read_text():
        assert time.monotonic() < deadline, f"{words!r} is not in {log}"
        time.sleep(0.1)


def _session_members(leader: int) -> set[int]:
    """The process and all its descendants, in any session."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    members = {leader}
    while new := {p for p, parent in parents.items() if parent in members} - members:
        members |= new
    return members


def _parent(folder: Path) -> int:
    try:
        return int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _gone(processes: set[int]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{p}").exists() and _state(p) != "Z" for p in processes):
            return True
        time.sleep(0.1)
    return False


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _shared_memory(processes: set[int]) -> set[Path]:
    """The files in /dev/shm that some processes have mapped."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended in the meantime
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line}
    return found
