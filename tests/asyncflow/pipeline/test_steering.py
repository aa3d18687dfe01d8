"""Steering a run from a program: a pause never blocks a stop, and no call waits for something that can't happen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import asyncflow
from asyncflow.client.run import Run
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, recipe_text
from asyncflow.run.launch import resume
from protocols.control.events import RunEnded, RunStarted, StepCommitted
from tests.asyncflow.conftest import MakeRecipe


async def test_a_stop_drains_though_a_pause_holds_up_an_evaluation(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(deadlines={"stop": 60.0})) as run:
        await run.pause()  # before the first evaluation, which generates
        async with asyncio.timeout(60):
            ended = await run.stop()
    assert (ended.outcome, ended.error) == ("stopped", "")
    assert (run.folder / "checkpoints" / "step_000000" / "manifest.json").exists()


async def test_a_requested_checkpoint_fails_when_the_run_is_ended_at_once(make_recipe: MakeRecipe) -> None:
    asking: list[asyncio.Task[object]] = []

    async def run_and_be_cancelled() -> None:
        async with asyncflow.launch(make_recipe()) as run:
            await run.pause()  # holds the evaluation, and every boundary between steps
            asking.append(asyncio.create_task(run.checkpoint()))
            await asyncio.sleep(0)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_and_be_cancelled()
    async with asyncio.timeout(60):
        with pytest.raises(RunFailed, match="without draining"):
            await asking[0]


async def test_leaving_a_run_that_has_ended_says_nothing_more(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(steps=1)) as run:
        await run.wait()
    events = [event async for event in run.events()]
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunEnded)


async def test_a_run_that_is_resumed_with_fewer_steps_ends_what_it_had_admitted(make_recipe: MakeRecipe) -> None:
    folder = await _stopped_with_live_samples(make_recipe(steps=9, staleness=2, deterministic=False))
    done = Ledger(folder / "ledger.db")
    version, live = done.version, done.totals().live
    done.close()
    assert live, "no sample was in flight, so this proves nothing"
    _rewrite(folder, steps=version - 1)
    with pytest.raises(BadInput, match=f"want {version} or more"):
        async with resume(folder):
            pass
    _rewrite(folder, steps=version)
    async with resume(folder) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    ledger = Ledger(folder / "ledger.db")
    assert ledger.reasons()["dropped", "run_ended"] == live
    assert ledger.totals().live == 0
    ledger.close()


async def _stopped_with_live_samples(recipe: Recipe) -> Path:
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 2:
                break
        await run.stop()
    return run.folder


def _rewrite(folder: Path, steps: int) -> None:
    text = recipe_text(load_recipe(folder / "recipe.toml", [f"steps={steps}"]))
    (folder / "recipe.toml").write_text(text)


async def test_a_table_is_a_recipe_and_an_awaited_run_needs_no_block(table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"recipe: unknown key stepps, did you mean 'steps'"):
        await asyncflow.launch({**table, "stepps": 1})
    run = await asyncflow.launch({**table, "steps": 1, "data": table["data"] | {"eval": ""}}, folder=tmp_path / "run")
    assert (await run.wait()).outcome == "finished"
    async with asyncflow.resume(run.folder) as again:  # nothing holds the folder any more
        assert (await again.wait()).outcome == "finished"


async def test_a_call_from_another_threads_loop_or_after_the_end_says_so(make_recipe: MakeRecipe) -> None:
    def from_another_thread(run: Run, call: Callable[[Run], Awaitable[object]]) -> None:
        async def main() -> None:
            await call(run)

        asyncio.run(main())

    calls: list[Callable[[Run], Awaitable[object]]] = [
        Run.pause,
        Run.resume,
        Run.checkpoint,
        Run.reload,
        Run.statistics,
        Run.stop,
        Run.wait,
        lambda run: anext(run.events()),
        lambda run: anext(run.channel("rollouts").subscribe()),
    ]
    async with asyncflow.launch(make_recipe(steps=1, data={"eval": ""})) as run:
        for call in calls:
            with pytest.raises(RuntimeError, match="belongs to the event loop that started it, in thread 'MainThread'"):
                await asyncio.to_thread(from_another_thread, run, call)
        await run.wait()
        for call in calls[:5]:
            with pytest.raises(RunFailed, match=r"the run is over; asyncflow\.resume goes on"):
                await call(run)
    assert (await run.stop()).outcome == "finished", "a stop that comes late learns how it ended"


def test_what_a_program_may_use_is_listed_for_completion() -> None:
    assert {"launch", "resume", "Run", "BadInput"} <= set(dir(asyncflow))
