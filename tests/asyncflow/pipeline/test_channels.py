"""Subscribers and external workers of a run: a subscriber changes nothing, a worker's answers are what is trained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asyncflow
from asyncflow.client.outside import NotAsked, Outside
from asyncflow.client.run import Run
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput, Recipe
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import StepCommitted
from protocols.data.messages import Experience, Rollouts, Scores, Values
from tests import tiny
from tests.asyncflow.conftest import MakeRecipe
from tests.asyncflow.pipeline import runs
from tests.asyncflow.pipeline.runs import Weights, differing

STEPS, ROWS = 2, 8  # rows per step
OUTSIDE: dict[str, Any] = {
    "models": {"reward": {"outside": True}},
    "failures": {"outside_timeout_seconds": 30.0},
}
TOKENIZER = tiny.tokenizer()


def variety(response: str) -> float:
    """A score that differs from row to row."""
    return len(set(response)) / (1 + len(response))


def scored(rollouts: Rollouts) -> Scores:
    """The rule's scores, computed outside of the run."""
    texts = [TOKENIZER.decode(response.tolist(), skip_special_tokens=True) for response in rollouts.responses]
    return Scores(sample_ids=rollouts.sample_ids, scores=np.array([variety(str(text)) for text in texts], np.float32))


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRecipe:
    """A recipe of two steps without evaluation, scored by a rule."""
    (tmp_path / "varied.py").write_text(
        "def variety(prompt, response, reference):\n    return len(set(response)) / (1 + len(response))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def make(**changes: Any) -> Recipe:
        rule = {"reward": {"rule": "varied:variety"}}
        return make_recipe(**{"steps": STEPS, "data": {"eval": ""}, "models": rule, **changes})

    return make


@asynccontextmanager
async def beside(*workers: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run coroutines next to the block. They end by themselves when the run has ended."""
    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for number, worker in enumerate(workers):
            group.create_task(worker, name=f"outside {number}")
        yield


async def read(run: Run, channel: str, into: list[Any]) -> None:
    """A subscriber that reads without delay."""
    async for batch in run.channel(channel).subscribe():
        into.append(batch)


async def work(outside: Outside, answered: list[int], most: int = 64) -> None:
    """An external worker that answers every row; adds the samples to `answered`."""
    async for rollouts in outside.rows(most):
        assert await outside.put(scored(rollouts)) == {}
        answered += rollouts.sample_ids.tolist()


def weights(run: Run) -> Weights:
    """The final weights of policy and critic."""
    roles = {role: runs.weights(run.folder, STEPS, role) for role in ("policy", "critic")}
    return {f"{role}.{name}": tensor for role, tensors in roles.items() for name, tensor in tensors.items()}


def reasons(run: Run) -> dict[tuple[str, str], int]:
    """(state, reason) -> the number of samples that ended so."""
    ledger = Ledger(run.folder / "ledger.db")
    try:
        return ledger.reasons()
    finally:
        ledger.close()


async def finish(run: Run) -> None:
    """Wait until a run has reached its last step."""
    ended = await run.wait()
    assert ended.outcome == "finished", ended.error


# --- subscribers


async def test_subscribers_change_no_bit_and_see_every_row_once(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe()) as alone:
        await finish(alone)
    seen: dict[str, list[Any]] = {"policy.generate#1": [], "values": [], "scores": [], "experience": []}
    async with asyncflow.launch(recipe()) as run, beside(*(read(run, name, into) for name, into in seen.items())):
        await finish(run)
    assert differing(weights(run), weights(alone)) == []
    for name, batches in seen.items():
        samples = [sample for batch in batches for sample in batch.sample_ids.tolist()]
        assert (len(samples), len(set(samples))) == (STEPS * ROWS, STEPS * ROWS), name
    assert [type(batches[0]) for batches in seen.values()] == [Rollouts, Values, Scores, Experience]
    with pytest.raises(ValueError, match="read-only"):  # its memory is shared with the run's own consumers
        seen["policy.generate#1"][0].responses.values[0] = 1


async def test_a_reader_that_pauses_blocks_nothing(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe()) as run:
        batches = run.channel("rollouts").subscribe()
        assert len(await anext(batches)) == ROWS
        await finish(run)
        rest = [batch async for batch in batches]  # what was queued for it
    assert sum(map(len, rest)) == (STEPS - 1) * ROWS


async def test_a_reader_may_leave(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe()) as run:
        async for _ in run.channel("rollouts").subscribe():
            break
        await finish(run)


@pytest.mark.parametrize("name", ["rollout", "policy.update#1", "prompts"])
async def test_a_name_that_sends_nothing_is_refused_with_the_names_that_do(recipe: MakeRecipe, name: str) -> None:
    async with asyncflow.launch(recipe()) as run:
        with pytest.raises(BadInput, match=f"channel '{name}': no stage and no message of this run"):
            await anext(run.channel(name).subscribe())


# --- external workers


async def test_an_outside_reward_trains_bit_for_bit_what_the_rule_trains(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe()) as inside:
        await finish(inside)
    answered: list[int] = []
    async with asyncflow.launch(recipe(**OUTSIDE)) as run, beside(work(run.outside("reward"), answered, most=3)):
        await finish(run)
    assert [step.reward_mean for step in run.metrics] == [step.reward_mean for step in inside.metrics]
    assert len({step.reward_mean for step in run.metrics}) == STEPS, "rewards that don't differ would prove nothing"
    assert differing(weights(run), weights(inside)) == []
    assert len(answered) == len(set(answered)) == STEPS * ROWS


async def test_two_workers_share_the_rows(recipe: MakeRecipe) -> None:
    shares: list[list[int]] = [[], []]
    async with (
        asyncflow.launch(recipe(**OUTSIDE)) as run,
        beside(*(work(run.outside("reward"), share, most=2) for share in shares)),
    ):
        await finish(run)
    assert all(shares)
    assert len({*shares[0], *shares[1]}) == len([*shares[0], *shares[1]]) == STEPS * ROWS


async def test_a_subscriber_may_answer_rows_before_they_are_requested(recipe: MakeRecipe) -> None:
    """It never takes rows; its put waits until the scores are requested."""

    async def publish(run: Run) -> None:
        async for rollouts in run.channel("rollouts").subscribe():
            assert isinstance(rollouts, Rollouts)
            assert await run.outside("reward").put(scored(rollouts)) == {}

    async with asyncflow.launch(recipe(**OUTSIDE)) as run, beside(publish(run)):
        await finish(run)


async def test_rows_that_a_worker_gives_up_fail_with_its_cause(recipe: MakeRecipe) -> None:
    async def work_but_refuse_one(outside: Outside) -> None:
        refused = 0
        async for rollouts in outside.rows(most=1):
            if refused:
                await outside.put(scored(rollouts))
            else:
                refused += 1
                await outside.fail(rollouts.sample_ids, "the scorer is ill")

    async with (
        asyncflow.launch(recipe(**OUTSIDE)) as run,
        beside(work_but_refuse_one(run.outside("reward"))),
    ):
        await finish(run)
    assert reasons(run)["failed", "the scorer is ill"] == 1
    assert reasons(run)["dropped", "group_incomplete"] == 1


async def test_without_a_worker_the_rows_fail_in_time_and_the_run_says_why(recipe: MakeRecipe) -> None:
    hasty = {**OUTSIDE, "failures": {"outside_timeout_seconds": 0.2}, "max_refills": 1}
    async with asyncflow.launch(recipe(**hasty)) as run:
        ended = await run.wait()
    assert ended.outcome == "failed"
    assert "no answer from an external worker within 0.2 s" in ended.error


async def test_rows_of_a_worker_that_does_not_answer_go_to_another_one(recipe: MakeRecipe) -> None:
    """The slow worker's late answers are refused, because each row is answered once."""
    late: list[dict[int, str]] = []
    answered: list[int] = []

    async def work_slowly(run: Run) -> None:
        async for rollouts in run.outside("reward").rows():
            await run.wait()
            late.append(await run.outside("reward").put(scored(rollouts)))

    impatient = {**OUTSIDE, "failures": {"outside_timeout_seconds": 30.0, "outside_retake_seconds": 0.3}}
    async with (
        asyncflow.launch(recipe(**impatient)) as run,
        beside(work_slowly(run), work(run.outside("reward"), answered)),  # the slow one takes rows first
    ):
        await finish(run)
    assert len(answered) == len(set(answered)) == STEPS * ROWS
    assert list(late[0]) == answered[:ROWS]
    assert set(late[0].values()) == {"it was answered already"}


async def test_what_can_not_be_an_answer_is_refused_and_costs_nothing(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe(**OUTSIDE)) as run:
        outside = run.outside("reward")
        async for rollouts in outside.rows():
            with pytest.raises(BadInput, match=r"outside reward: .*wants Scores, got Rollouts; nothing was taken"):
                await outside.put(rollouts)
            listed: Any = [1.0] * len(rollouts)
            with pytest.raises(BadInput, match=r"outside reward: Scores\.scores is a list, want float32 in a ndarray"):
                await outside.put(Scores(sample_ids=rollouts.sample_ids, scores=listed))
            nan = Scores(sample_ids=rollouts.sample_ids, scores=np.full(len(rollouts), np.nan, np.float32))
            with pytest.raises(BadInput, match="not finite"):
                await outside.put(nan)
            with pytest.raises(NotAsked, match=r"1 rows were not asked for within 0\.1 s: samples 77") as error:
                await outside.put(Scores(sample_ids=np.array([77]), scores=np.ones(1, np.float32)), seconds=0.1)
            assert error.value.sample_ids == [77]
            assert await outside.put(scored(rollouts)) == {}
        await finish(run)
    assert reasons(run).keys() == {("trained", "")}


async def test_only_an_external_role_has_external_workers(recipe: MakeRecipe) -> None:
    async with asyncflow.launch(recipe()) as run:
        with pytest.raises(BadInput, match="outside 'reward': no such external role; of this run: none"):
            await anext(run.outside("reward").rows())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"reward": {"outside": True, "rule": "exact_match"}}}, "models.reward: its worker is external"),
        ({"models": {"critic": {"outside": True}}}, "models.critic.outside = true: only rewards and costs"),
        ({**OUTSIDE, "placement": {"reward": {"pool": "main"}}}, "placement.reward: its model is external"),
        ({**OUTSIDE, "deadlines": {"give_up": 20.0}}, "outside_timeout_seconds = 30: .*give_up = 20 s is ended"),
    ],
)
def test_a_recipe_whose_outside_model_makes_no_sense_is_refused(
    recipe: MakeRecipe, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        check(recipe(**changes))


# --- on Ray


@pytest.mark.ray
async def test_on_ray_readers_and_workers_are_served_by_the_actors(recipe: MakeRecipe) -> None:
    """Frames are above the inline limit, so that the reader maps them from the object store."""
    seen: list[Rollouts] = []
    answered: list[int] = []
    on_ray = recipe(**OUTSIDE, runtime="ray", deterministic=False, inline_bytes=0)
    async with (
        asyncflow.launch(on_ray) as run,
        beside(read(run, "rollouts", seen), work(run.outside("reward"), answered)),
    ):
        await finish(run)
    samples = [sample for batch in seen for sample in batch.sample_ids.tolist()]
    assert len(samples) == len(set(samples)) == STEPS * ROWS
    assert sorted(samples) == sorted(answered)


async def test_statistics_count_rows_and_name_waits(make_recipe: MakeRecipe) -> None:
    statistics: dict[str, ServiceStatistics] = {}
    async with asyncflow.launch(make_recipe(steps=3)) as run:
        async for event in run.events():
            if isinstance(event, StepCommitted) and event.step == 1:
                statistics = {s.service: s for s in await run.statistics()}
                break
        await run.wait()
        with pytest.raises(RunFailed, match="the run is over"):
            await run.statistics()
    (scored,) = statistics["reward"].edges
    assert scored.edge == "reward.score#1.0"
    assert scored.rows >= 8, "one step's samples"
    assert (scored.refused, scored.damaged) == (0, 0)
    assert scored.read_bytes[0] > 0
    assert set(statistics["reward"].waits) <= {"reward.score#1"}
    assert statistics["policy"].kept > 0, "rows that may have to be sent again"
