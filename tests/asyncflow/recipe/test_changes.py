"""Which keys of a recipe a resumed run may change: every key has a rule, and a reason where it is fixed."""

from __future__ import annotations

import pytest

from asyncflow.recipe.changes import Change, changes, reason_of
from asyncflow.recipe.reference import tables
from tests.asyncflow.conftest import MakeRecipe


def test_every_key_has_a_rule():
    for table in tables("recipe"):
        for setting in table.settings:
            reason_of(setting.key)


@pytest.mark.parametrize(
    "key",
    [
        "steps",
        "checkpoints.every",
        "evaluation.limit",
        "deadlines.stop",
        "failures.restarts",
        "threads",
        "models.critic.learning_rate",
        "placement.policy.parallel",
        "data.eval",
    ],
)
def test_a_run_may_go_on_with_another(key: str):
    assert reason_of(key) == ""


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "algorithm",
        "samples_per_prompt",
        "models.policy.path",
        "models.policy.lora.rank",
        "models.reward.mix",
        "data.train",
        "advantage.kl",
    ],
)
def test_a_run_keeps_its(key: str):
    assert reason_of(key)


def test_changes_are_keys_with_both_values(make_recipe: MakeRecipe):
    found = changes(make_recipe(), make_recipe(steps=9, delays={"policy": {"update": 0.5}}))
    assert found == [Change("steps", 5, 9), Change("delays.policy.update", None, 0.5)]
    assert str(found[0]) == "steps: 5 -> 9"
    assert changes(make_recipe(), make_recipe()) == []


def test_another_model_is_one_change_with_its_reason(make_recipe: MakeRecipe):
    (change,) = changes(make_recipe(), make_recipe(models={"reward": {"rule": "exact_match"}}))[:1]
    assert change.key.startswith("models.reward.") and change.fixed_because
