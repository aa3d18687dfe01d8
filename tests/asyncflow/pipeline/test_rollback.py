"""A service that trains may die: all that is trained goes back to the last checkpoint, and the run goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import asyncflow
from asyncflow.control.store.ledger import Ledger, Totals
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe
from asyncflow.run import launch
from asyncflow.services.runtime.local import LocalRuntime
from protocols.control.events import RolledBack, RunEnded, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.runs import differing, finished, weights


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> LocalRuntime:
    """The runtime of the next run."""
    made = LocalRuntime()
    monkeypatch.setattr(launch, "runtime_of", lambda *_: made)
    return made


async def run_with_deaths(
    recipe: Recipe, runtime: LocalRuntime, deaths: dict[int, list[str]]
) -> tuple[Path, RunEnded, list[RolledBack]]:
    """Run a recipe; the services in `deaths` die when their step is committed for the first time."""
    rollbacks: list[RolledBack] = []
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted):
                for name in deaths.pop(event.step, []):
                    runtime.kill(name)
            if isinstance(event, RolledBack):
                rollbacks.append(event)
        return run.folder, await run.wait(), rollbacks


def totals_of(folder: Path) -> Totals:
    ledger = Ledger(folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    return totals


@pytest.mark.parametrize("dead", [["policy"], ["critic"], ["policy", "critic"]], ids=" and ".join)
async def test_a_run_whose_trainers_die_ends_like_one_whose_trainers_never_died(
    make_recipe: MakeRecipe, runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch, dead: list[str]
) -> None:
    recipe = make_recipe(steps=6, checkpoints={"every": 2}, evaluation={"every": 1, "limit": 2})
    folder, ended, rollbacks = await run_with_deaths(recipe, runtime, {3: dead})
    assert ended.outcome == "finished", ended.error
    (back,) = rollbacks
    assert (back.step, back.term, sorted(back.services)) == (2, 1, sorted(dead))
    assert back.lost_steps in (1, 2), "step 3, and step 4 if it was committed before the death was seen"
    monkeypatch.undo()
    whole = await finished(recipe)
    for role in ("policy", "critic"):
        assert differing(weights(folder, 6, role), weights(whole, 6, role)) == [], role
    totals = totals_of(folder)
    assert (totals.created, totals.trained, totals.live) == (6 * 4 * 2, 6 * 4 * 2, 0), "each sample was trained once"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 7))
    assert [line["step"] for line in read_lines(folder / "evaluations.jsonl")] == list(range(7))


async def test_prompts_in_flight_over_several_versions_are_trained_once(
    make_recipe: MakeRecipe, runtime: LocalRuntime
) -> None:
    """A generator of its own keeps its process, and serves nothing until it has weights of the new term."""
    recipe = make_recipe(
        steps=7,
        staleness=2,
        deterministic=False,
        checkpoints={"every": 3},
        pools={"main": {}, "rollout": {}},
        placement={"generator": {"pool": "rollout"}},
    )
    folder, ended, rollbacks = await run_with_deaths(recipe, runtime, {2: ["policy"], 5: ["critic"]})
    assert ended.outcome == "finished", ended.error
    assert [(back.step, back.term) for back in rollbacks] == [(0, 1), (3, 2)]
    totals = totals_of(folder)
    assert (totals.created, totals.trained, totals.live) == (7 * 4 * 2, 7 * 4 * 2, 0)
    assert max(line["staleness_max"] for line in read_lines(folder / "metrics.jsonl")) <= 2
    assert "is restarted" not in (folder / "logs" / "controller.log").read_text(), "the others kept their processes"


async def test_a_trainer_that_dies_time_and_again_ends_the_run_with_the_cause(
    make_recipe: MakeRecipe, runtime: LocalRuntime
) -> None:
    recipe = make_recipe(steps=6, failures={"restarts": 1}, checkpoints={"every": 1})
    _, ended, rollbacks = await run_with_deaths(recipe, runtime, {1: ["policy"], 3: ["policy"]})
    assert [back.services for back in rollbacks] == [["policy"]]
    assert (ended.outcome, ended.exit_code) == ("failed", 1)
    assert ended.error.startswith("policy died 2 times within 3600 s, more than failures.restarts = 1 allows: policy:")


async def test_what_clients_asked_for_is_done_in_the_new_term(make_recipe: MakeRecipe, runtime: LocalRuntime) -> None:
    recipe = make_recipe(steps=4, checkpoints={"every": 1}, delays={"critic": {"update": 0.5}})
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 1:
                await run.pause()
                runtime.kill("policy")
            if isinstance(event, RolledBack):
                break
        written = await run.checkpoint()
        assert Path(written).name in ("step_000000", "step_000001")
        await run.resume()
        assert (await run.wait()).outcome == "finished"


async def test_a_pause_while_the_run_rolls_back_holds_in_the_new_term(
    make_recipe: MakeRecipe, runtime: LocalRuntime
) -> None:
    recipe = make_recipe(steps=4, checkpoints={"every": 1})
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 1:
                break
        runtime.kill("policy")
        await run.pause()  # the policy generates, and is gone
        await run.resume()
        await run.pause()
        step = -1
        async for event in run.events():
            if isinstance(event, RolledBack):
                step = event.step
                break
        written = await run.checkpoint()
        assert Path(written).name == f"step_{step:06d}", "no step is made"
        await run.resume()
        assert (await run.wait()).outcome == "finished"


async def test_a_run_that_is_stopped_when_its_trainer_dies_ends_with_its_last_checkpoint(
    make_recipe: MakeRecipe, runtime: LocalRuntime
) -> None:
    recipe = make_recipe(steps=9, checkpoints={"every": 1}, delays={"critic": {"update": 1.0}})
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 2:
                break
        stopping = asyncio.create_task(run.stop())
        runtime.kill("policy")
        ended = await stopping
    assert (ended.outcome, ended.exit_code) == ("stopped", 1)
    assert "policy died while the run was to stop" in ended.error
    assert ended.error.endswith(("step_000001", "step_000002"))
