"""Generation ahead of training: the bound on staleness holds, every sample is accounted for, runs can be steered."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

import asyncflow
from asyncflow.run.launch import resume
from protocols.control.events import Evaluated, Published, RunEnded, SamplesEnded, Stalled, StateChanged, StepCommitted
from tests.asyncflow.conftest import MakeRecipe

GENERATOR = {
    "pools": {"train": {}, "rollout": {}},
    "placement": {"generator": {"pool": "rollout"}},
    "deterministic": False,
}


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_no_trained_sample_is_older_than_the_bound(make_recipe: MakeRecipe, staleness: int) -> None:
    # While the slow critic trains, generation runs ahead as far as admission allows.
    recipe = make_recipe(steps=6, staleness=staleness, delays={"critic": {"update": 0.05}}, **GENERATOR)
    async with asyncflow.launch(recipe) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    ages = [step.staleness_max for step in run.metrics]
    assert max(ages) == staleness, f"ages {ages}: the bound {staleness} should be reached and never exceeded"


async def test_a_publication_is_verified_at_every_step(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(steps=3, **GENERATOR)) as run:
        published = [e async for e in run.events() if isinstance(e, Published)]
    assert [p.version.step for p in published] == [0, 1, 2, 3]
    assert all(p.receipts[0].probe_difference < 1e-4 for p in published)


async def test_pause_holds_the_run_still_and_resume_lets_it_finish(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(steps=8, staleness=1, **GENERATOR)) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 2:
                await run.pause()
            if isinstance(event, StateChanged) and event.state == "paused":
                break
        folder = await run.checkpoint()  # written while paused
        committed = int(folder.name.removeprefix("step_"))
        assert (folder / "manifest.json").exists()
        still = len(run.metrics)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                async for event in run.events():
                    assert not (isinstance(event, StepCommitted) and event.step > committed), "a step while paused"
        await run.resume()
        assert (await run.wait()).outcome == "finished"
        assert len(run.metrics) == 8 > still


async def test_a_stopped_asynchronous_run_resumes_without_losing_or_doubling_a_sample(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(steps=8, staleness=2, **GENERATOR)) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 3:
                break
        ended = await run.stop()
    assert (ended.outcome, ended.exit_code) == ("stopped", 130)
    async with resume(run.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    states = _states(run.folder)
    assert states == {("trained", 8 * 4 * 2)}, states


async def test_a_reward_that_raises_or_hangs_fails_its_sample_and_not_the_run(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moody.py").write_text(
        "import time\n"
        "def score(prompt, response, reference):\n"
        "    if prompt.startswith('3'):\n"
        "        raise RuntimeError('no threes')\n"
        "    if prompt.startswith('4'):\n"
        "        time.sleep(600)\n"
        "    return len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_recipe(
        steps=4,
        max_refills=20,
        models={"reward": {"rule": "moody:score"}},
        failures={"reward_timeout_seconds": 0.3, "reward_retries": 0},
    )
    async with asyncflow.launch(recipe) as run:
        events = [e async for e in run.events()]
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.outcome == "finished", ended.error
    reasons = {(e.state, e.reason) for e in events if isinstance(e, SamplesEnded)}
    assert ("failed", "rule moody:score raised RuntimeError: no threes") in reasons
    assert ("failed", "rule moody:score gave no answer within 0.3 s") in reasons
    states = dict(_states(run.folder))
    assert states["trained"] == 4 * 4 * 2
    assert all(step.reward_mean > 0 for step in run.metrics), "a failed sample became a reward of 0"


async def test_a_run_whose_every_reward_fails_ends_with_the_reject_rate(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("def score(prompt, response, reference):\n    return None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        reward = {"rule": "broken:score", "check": False}
        async with asyncflow.launch(make_recipe(max_refills=2, models={"reward": reward})) as run:
            ended = await run.wait()
    assert (ended.outcome, ended.exit_code) == ("failed", 1)
    assert "max_refills = 2" in ended.error
    assert "returned None" in ended.error


async def test_evaluation_sees_the_held_out_prompts_before_and_after(make_recipe: MakeRecipe) -> None:
    async with asyncflow.launch(make_recipe(steps=2, evaluation={"every": 1})) as run:
        evaluations = [e async for e in run.events() if isinstance(e, Evaluated)]
    assert [(e.step, e.samples) for e in evaluations] == [(0, 10), (1, 10), (2, 10)]


async def test_several_held_out_sets_make_a_curve_of_each_metric(make_recipe: MakeRecipe, data: Path) -> None:
    path = str(data / "heldout.jsonl")
    sampled = {"path": path, "metric": ["prefix_match", "reward"], "samples": 2, "temperature": 1.0, "limit": 4}
    sets = {"greedy": path, "sampled": {**sampled, "pass_score": 0.1}}
    async with asyncflow.launch(make_recipe(steps=1, data={"eval": sets})) as run:
        evaluations = [e async for e in run.events() if isinstance(e, Evaluated)]
    curves = [f"sampled.{m}{k}" for m in ("prefix_match", "reward") for k in ("", ".pass@2")]
    points = [("greedy.exact_match", 10), *((curve, 8) for curve in curves)]
    assert [(e.step, e.metric, e.samples) for e in evaluations] == [(s, *p) for s in (0, 1) for p in points]


def _states(folder: Path) -> set[tuple[str, int]]:
    database = sqlite3.connect(folder / "ledger.db")
    try:
        return set(database.execute("SELECT state, COUNT(*) FROM samples GROUP BY state").fetchall())
    finally:
        database.close()


async def test_a_stall_is_reported_with_who_waits_on_whom(make_recipe: MakeRecipe) -> None:
    """While the slow reward works nothing else can go on, and the reported waits lead to it."""
    recipe = make_recipe(
        steps=1,
        deterministic=False,
        data={"eval": ""},
        delays={"reward": {"score": 3.0}},
        deadlines={"stall": 1.0, "give_up": 60.0},
    )
    stalls: list[Stalled] = []
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            if isinstance(event, Stalled):
                stalls.append(event)
        assert (await run.wait()).outcome == "finished"
    graphs = [[line.split(" since ")[0] for line in stall.graph] for stall in stalls]
    while_it_works = [waits for waits in graphs if not any(line.startswith("reward.score#1") for line in waits)]
    assert any("policy.update#1 waits for batch on gae#1" in waits for waits in while_it_works), graphs
