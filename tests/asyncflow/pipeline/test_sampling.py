"""A run with truncated sampling: at staleness 0 the trainer's log-probs are the generator's at every step."""

from __future__ import annotations

import asyncflow
from asyncflow.observe.journal import read_lines
from tests.asyncflow.conftest import MakeRecipe


async def test_engine_and_trainer_agree_at_every_step_of_truncated_sampling(make_recipe: MakeRecipe) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "min_tokens": 2, "stop": ["7", "ab"]}
    recipe = make_recipe(steps=3, generation=sampling, loss={"entropy_coefficient": 0.01}, data={"eval": ""})
    async with asyncflow.launch(recipe) as run:
        assert (await run.wait()).outcome == "finished"
    steps = read_lines(run.folder / "metrics.jsonl")
    assert len(steps) == 3
    for step in steps:
        assert 0.0 <= step["policy.mismatch_mean"] <= step["policy.mismatch_max"] < 1e-5
        assert step["policy.entropy"] > 0.0
