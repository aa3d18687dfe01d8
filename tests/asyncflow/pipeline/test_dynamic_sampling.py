"""Prompts that teach nothing are dropped and refilled: the batch is full, and every sample still ends exactly once."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncflow
from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.store.ledger import Ledger
from asyncflow.recipe.checks import check
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import resume
from protocols.control.events import RunEnded, SamplesEnded, StepCommitted
from protocols.data.ids import prompt_of
from tests.workers.checkpoints import trained_weights

STEPS, PROMPTS, SAMPLES = 3, 4, 2

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """DAPO on a rule of `rules`."""

    def make(rule: str = "flat_where_even", **changes: Any) -> Recipe:
        models = {"policy": table["models"]["policy"], "reward": {"rule": f"tests.asyncflow.pipeline.rules:{rule}"}}
        sizes = {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
        return to_recipe(table | {"algorithm": "dapo", "models": models, "advantage": {}} | sizes | changes)

    return make


class Told:
    """What a run told, and where it lies."""

    def __init__(self, folder: Path, ended: RunEnded, events: list[Any]) -> None:
        self.folder, self.ended = folder, ended
        self.steps = [event for event in events if isinstance(event, StepCommitted)]
        self.dropped = sum(e.count for e in events if isinstance(e, SamplesEnded) and e.reason == "no_signal")


async def told_by(recipe: Recipe) -> Told:
    async with asyncflow.launch(recipe) as run:
        events = [event async for event in run.events()]
        return Told(run.folder, await run.wait(), events)


def ends(folder: Path) -> dict[int, tuple[str, str]]:
    """sample id -> (state, reason)."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        return {i: (state, why) for i, state, why in database.execute("SELECT sample_id, state, reason FROM samples")}
    finally:
        database.close()


def first_digits(recipe: Recipe, source: PromptSource, samples: list[int]) -> set[int]:
    """Of the prompts of these samples."""
    wanted = set(map(prompt_of, samples))
    rows = source.requests(sorted(wanted), 1, 0)
    tokenizer = json.loads((Path(recipe.models["policy"].path) / "tokenizer.json").read_text())["model"]["vocab"]
    character = {token: text for text, token in tokenizer.items()}
    return {int(character[int(tokens[0])]) for tokens in rows.prompts}


def assert_whole(recipe: Recipe, told: Told) -> None:
    """Full batches of prompts that tell answers apart; all others dropped; nothing lost."""
    assert told.ended.outcome == "finished", told.ended.error
    assert [step.samples for step in told.steps] == [PROMPTS * SAMPLES] * STEPS
    assert all(step.metrics["flat_groups"] == 0.0 for step in told.steps)
    ended, source = ends(told.folder), check(recipe).train
    counts = Counter(ended.values())
    assert counts["trained", ""] == STEPS * PROMPTS * SAMPLES
    assert counts["dropped", "no_signal"] == told.dropped > 0
    for (state, reason), parity in ((("trained", ""), 1), (("dropped", "no_signal"), 0)):
        samples = [sample for sample, how in ended.items() if how == (state, reason)]
        assert {digit % 2 for digit in first_digits(recipe, source, samples)} == {parity}
    ledger = Ledger(told.folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.live, totals.failed, totals.imbalance) == (0, 0, 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return trained_weights(folder / "checkpoints" / f"step_{STEPS:06d}" / "policy")


async def test_prompts_without_spread_are_replaced_and_two_runs_are_the_same_bit_for_bit(recipe_of: MakeOf):
    recipe = recipe_of()
    first, second = [await told_by(recipe) for _ in range(2)]
    assert_whole(recipe, first)
    assert ends(first.folder) == ends(second.folder)
    for name, tensor in weights(first.folder).items():
        assert torch.equal(tensor, weights(second.folder)[name]), name


async def test_a_run_that_was_stopped_between_refills_resumes_to_the_same_weights(recipe_of: MakeOf):
    recipe = recipe_of()
    whole = await told_by(recipe)
    async with asyncflow.launch(recipe) as stopped:
        async for event in stopped.events():
            if isinstance(event, StepCommitted):
                break
        assert (await stopped.stop()).outcome == "stopped"
    async with resume(stopped.folder) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    for name, tensor in weights(resumed.folder).items():
        assert torch.equal(tensor, weights(whole.folder)[name]), name


@pytest.mark.parametrize("staleness", [0, 2])
async def test_generating_ahead_drops_and_refills_as_well(recipe_of: MakeOf, staleness: int):
    pools = {name: {"devices": 1} for name in ("train", "rollout")}
    placement = {"policy": {"pool": "train"}, "generator": {"pool": "rollout"}}
    recipe = recipe_of(deterministic=False, staleness=staleness, pools=pools, placement=placement)
    told = await told_by(recipe)
    assert_whole(recipe, told)
    assert max(step.staleness_max for step in told.steps) <= staleness


async def test_a_task_that_teaches_nothing_ends_the_run_with_its_reject_rate(recipe_of: MakeOf):
    told = await told_by(recipe_of("flat", max_refills=1))
    assert (told.ended.outcome, told.ended.exit_code) == ("failed", 1)
    assert "step 0: 5 prompts failed or were dropped, more than max_refills = 1 rounds of 4" in told.ended.error
    assert "reject rate at least 56%" in told.ended.error
    assert "last cause: no_signal" in told.ended.error
