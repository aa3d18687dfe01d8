"""Rules in a run: those that fail, those that read columns of the data, and those that teach nothing."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import asyncflow
from asyncflow.control.store.ledger import Ledger
from asyncflow.recipe.config import Recipe, to_recipe
from protocols.control.events import Event, StepCommitted, Warned
from protocols.data.ids import prompt_of

STEPS, PROMPTS, SAMPLES = 3, 4, 4

MakeOf = Callable[..., Recipe]


@pytest.fixture
def recipe_of(table: dict[str, Any]) -> MakeOf:
    """A recipe of GRPO with a rule of `rules`, which is not tried out before the run."""

    def make(rule: str, **failures: Any) -> Recipe:
        reward = {"rule": f"tests.asyncflow.pipeline.rules:{rule}", "check": False}
        models = {name: table["models"][name] for name in ("policy", "reference")} | {"reward": reward}
        sizes = {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_refills": 50}
        own = {"algorithm": "grpo", "models": models, "advantage": {}, "failures": {"reward_retries": 0, **failures}}
        return to_recipe(table | {"data": {"train": table["data"]["train"]}} | own | sizes)

    return make


async def events_of(recipe: Recipe) -> tuple[Path, list[Event]]:
    async with asyncflow.launch(recipe) as run:
        events = [event async for event in run.events()]
        assert (await run.wait()).outcome == "finished"
        return run.folder, events


def ends(folder: Path) -> dict[int, list[str]]:
    """Prompt -> how each of its samples ended, with the reason where it was not trained."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        found: defaultdict[int, list[str]] = defaultdict(list)
        for sample, state, reason in database.execute("SELECT sample_id, state, reason FROM samples"):
            found[prompt_of(sample)].append(f"{state} {reason}".strip())
        return found
    finally:
        database.close()


async def test_the_rest_of_a_group_trains_where_the_recipe_says_so_and_every_sample_ends_once(recipe_of: MakeOf):
    folder, events = await events_of(recipe_of("refuses_some", partial_groups=True))
    totals = Ledger(folder / "ledger.db").totals()
    assert (totals.imbalance, totals.live) == (0, 0)
    groups = [Counter(state.split()[0] for state in states) for states in ends(folder).values()]
    trained = [group for group in groups if group["trained"]]
    assert len(trained) == STEPS * PROMPTS, "a group counts as one, whatever its size"
    assert any(group["failed"] for group in trained), "otherwise this proves nothing"
    assert all(group["trained"] >= 2 and group["trained"] + group["failed"] == SAMPLES for group in trained)
    left = [group for group in groups if not group["trained"]]
    assert all(group["failed"] >= SAMPLES - 1 for group in left), "those with fewer than 2 left"
    steps = [event for event in events if isinstance(event, StepCommitted)]
    assert sum(step.samples for step in steps) == totals.trained == sum(group["trained"] for group in trained)


async def test_without_it_a_failure_ends_its_whole_group(recipe_of: MakeOf):
    folder, events = await events_of(recipe_of("refuses_some"))
    for states in ends(folder).values():
        failed = [state for state in states if state.startswith("failed")]
        others = {state for state in states if not state.startswith("failed")}
        assert others <= ({"dropped group_incomplete"} if failed else {"trained"})
    assert {event.samples for event in events if isinstance(event, StepCommitted)} == {PROMPTS * SAMPLES}


async def test_a_step_whose_rewards_are_all_the_same_is_a_warning(recipe_of: MakeOf):
    _, events = await events_of(recipe_of("flat"))
    assert [event.text for event in events if isinstance(event, Warned)] == [
        f"all 16 rewards of step {step} are 0.5: the policy learns nothing from them" for step in (1, 2, 3)
    ]


async def test_a_rule_beside_the_recipe_gets_the_columns_of_its_rows_in_a_run(
    recipe_of: MakeOf, table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "rule_of_columns.py").write_text(
        "async def level(responses, raw_responses, prompts, level, **columns):\n"
        "    assert columns['topic'] == ['sums'] * len(level)\n"
        "    return [{'level': n, 'half': 0.5 * (p == f'{n}+1=')} for n, p in zip(level, prompts)]\n"
    )
    rows = [f'{{"prompt": "{n}+1=", "level": {n}, "topic": "sums"}}' for n in range(1, 9)]
    (tmp_path / "levels.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("flat")
    reward = msgspec.structs.replace(recipe.models["reward"], rule="rule_of_columns.py:level", check=True)
    data = msgspec.structs.replace(recipe.data, train=str(tmp_path / "levels.jsonl"))
    changed = msgspec.structs.replace(
        recipe, models=recipe.models | {"reward": reward}, data=data, code=[str(tmp_path)]
    )
    folder, events = await events_of(changed)
    monkeypatch.chdir("/")
    async with asyncflow.resume(folder, overrides=[f"steps={STEPS + 1}"]) as run:
        assert (await run.wait()).outcome == "finished", "the rule is found from another folder, too"
    steps = [event for event in events if isinstance(event, StepCommitted)]
    assert [step.metrics["reward.half"] for step in steps] == [0.5] * STEPS
    assert all(step.reward_mean == pytest.approx(step.metrics["reward.level"] + 0.5) for step in steps)
