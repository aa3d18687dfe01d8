"""On Ray, a service's process reloads a changed file, and its successor runs the code that was reloaded."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

import asyncflow
from asyncflow.control.store.ledger import Ledger
from asyncflow.recipe.config import BadInput
from protocols.control.events import CodeReloaded, ServiceReplaced, StepCommitted
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline.test_replacement import process_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # seven processes that import torch, on a share of two cores

RULE = "def score(prompt, response, reference):\n    return {}\n"
STEPS = 8


@pytest.mark.usefixtures("ray_started")
async def test_a_successor_runs_the_code_that_was_reloaded_whatever_its_file_says_by_then(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "rays_users_file.py"
    file.write_text(RULE.format(1.0))
    monkeypatch.chdir(tmp_path)  # the caller's folder, which is not that of Ray's processes
    recipe = make_recipe(
        steps=STEPS,
        staleness=1,
        runtime="ray",
        deterministic=False,
        data={"eval": ""},
        models={"reward": {"rule": "rays_users_file:score"}},
        delays={"reward": {"score": 0.1}},
    )
    rewards: list[float] = []
    replaced = 0

    async with asyncflow.launch(recipe) as run:

        async def change() -> CodeReloaded:
            file.write_text("1 +")
            with pytest.raises(BadInput, match="SyntaxError"):
                await run.reload()
            file.write_text(RULE.format(3.0))
            reloaded = await run.reload()
            file.write_text("1 +")
            os.kill(process_of("reward", run.folder), signal.SIGKILL)
            return reloaded

        changing: asyncio.Task[CodeReloaded] | None = None
        async for event in run.events():
            if isinstance(event, StepCommitted):
                rewards.append(event.reward_mean)
                if event.step == 1:
                    changing = asyncio.create_task(change())
            replaced += isinstance(event, ServiceReplaced)
        ended = await run.wait()
        assert ended.outcome == "finished", ended.error
        assert changing is not None
        reloaded = await changing
    assert replaced == 1
    assert rewards[: reloaded.step] == [1.0] * reloaded.step
    assert rewards == sorted(rewards)
    assert rewards[-1] == 3.0
    ledger = Ledger(run.folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.created, totals.trained, totals.live) == (STEPS * 4 * 2, STEPS * 4 * 2, 0)
