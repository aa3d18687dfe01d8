"""Dynamic sampling: prompts with equal scores are dropped and replaced, batches stay full, each sample ends once."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asyncflow
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.store.ledger import Ledger
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import RunEnded, SamplesEnded, StepCommitted
from protocols.data.ids import prompt_of
from tests.asyncflow.pipeline.runs import differing, weights

STEPS, PROMPTS, SAMPLES = 3, 4, 2

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """A recipe of DAPO with a rule of `rules`."""

    def make(rule: str = "flat_where_even", **changes: Any) -> Recipe:
        models = {"policy": table["models"]["policy"], "reward": {"rule": f"tests.asyncflow.pipeline.rules:{rule}"}}
        sizes = {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
        return to_recipe(table | {"algorithm": "dapo", "models": models, "advantage": {}} | sizes | changes)

    return make


class Outcome:
    """A run's folder, end, steps and number of dropped samples."""

    def __init__(self, folder: Path, ended: RunEnded, events: list[Any]) -> None:
        self.folder, self.ended = folder, ended
        self.steps = [event for event in events if isinstance(event, StepCommitted)]
        self.dropped = sum(e.count for e in events if isinstance(e, SamplesEnded) and e.reason == "no_signal")


async def outcome_of(recipe: Recipe) -> Outcome:
    async with asyncflow.launch(recipe) as run:
        events = [event async for event in run.events()]
        return Outcome(run.folder, await run.wait(), events)


def ends(folder: Path) -> dict[int, tuple[str, str]]:
    """Sample id -> (state, reason) in the run's ledger."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        return {i: (state, why) for i, state, why in database.execute("SELECT sample_id, state, reason FROM samples")}
    finally:
        database.close()


def first_digits(recipe: Recipe, source: PromptSource, samples: list[int]) -> set[int]:
    """The first digits of these samples' prompts."""
    wanted = set(map(prompt_of, samples))
    rows = source.requests(sorted(wanted), 1, 0)
    tokenizer = json.loads((Path(recipe.models["policy"].path) / "tokenizer.json").read_text())["model"]["vocab"]
    character = {token: text for text, token in tokenizer.items()}
    return {int(character[int(tokens[0])]) for tokens in rows.prompts}


def assert_complete(recipe: Recipe, outcome: Outcome) -> None:
    """Batches are full of prompts with different scores, all other prompts are dropped, and no sample is lost."""
    assert outcome.ended.outcome == "finished", outcome.ended.error
    assert [step.samples for step in outcome.steps] == [PROMPTS * SAMPLES] * STEPS
    assert all(step.metrics["flat_groups"] == 0.0 for step in outcome.steps)
    ended, source = ends(outcome.folder), check(recipe).train
    counts = Counter(ended.values())
    assert counts["trained", ""] == STEPS * PROMPTS * SAMPLES
    assert counts["dropped", "no_signal"] == outcome.dropped > 0
    for (state, reason), parity in ((("trained", ""), 1), (("dropped", "no_signal"), 0)):
        samples = [sample for sample, how in ended.items() if how == (state, reason)]
        assert {digit % 2 for digit in first_digits(recipe, source, samples)} == {parity}
    ledger = Ledger(outcome.folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.live, totals.failed, totals.imbalance) == (0, 0, 0)


async def test_prompts_without_spread_are_replaced_and_two_runs_are_the_same_bit_for_bit(recipe_of: MakeOf):
    recipe = recipe_of()
    first, second = [await outcome_of(recipe) for _ in range(2)]
    assert_complete(recipe, first)
    assert ends(first.folder) == ends(second.folder)
    assert differing(weights(first.folder, STEPS), weights(second.folder, STEPS)) == []


async def test_a_run_that_was_stopped_between_refills_resumes_to_the_same_weights(recipe_of: MakeOf):
    recipe = recipe_of()
    whole = await outcome_of(recipe)
    async with asyncflow.launch(recipe) as stopped:
        async for event in stopped.events():
            if isinstance(event, StepCommitted):
                break
        assert (await stopped.stop()).outcome == "stopped"
    async with resume(stopped.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    assert differing(weights(resumed.folder, STEPS), weights(whole.folder, STEPS)) == []


@pytest.mark.parametrize("staleness", [0, 2])
async def test_generating_ahead_drops_and_refills_as_well(recipe_of: MakeOf, staleness: int):
    pools = {name: {"devices": 1} for name in ("train", "rollout")}
    placement = {"policy": {"pool": "train"}, "generator": {"pool": "rollout"}}
    recipe = recipe_of(deterministic=False, staleness=staleness, pools=pools, placement=placement)
    outcome = await outcome_of(recipe)
    assert_complete(recipe, outcome)
    assert max(step.staleness_max for step in outcome.steps) <= staleness


async def test_a_task_with_equal_scores_only_ends_the_run_with_its_reject_rate(recipe_of: MakeOf):
    outcome = await outcome_of(recipe_of("flat", max_refills=1))
    assert (outcome.ended.outcome, outcome.ended.exit_code) == ("failed", 1)
    assert "step 0: 5 prompts failed or were dropped, more than max_refills = 1 rounds of 4" in outcome.ended.error
    assert "reject rate at least 56%" in outcome.ended.error
    assert "last cause: no_signal" in outcome.ended.error
