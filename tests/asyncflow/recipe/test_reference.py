"""The settings reference is made from the types: it has every key, with its bounds, default and meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.recipe.config import BadInput
from asyncflow.recipe.reference import ROOTS, Setting, find, markdown_page, tables
from workers.settings import LARGEST

ROOT = Path(__file__).parents[3]


def one(key: str) -> Setting:
    table, *_ = find(key)  # then what algorithms make of it
    (setting,) = table.settings
    return setting


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_says_what_it_means(root: str):
    silent = [setting.key for table in tables(root) for setting in table.settings if not setting.meaning]
    assert not silent, f"write a comment beside the field of {silent}"
    assert all(table.meaning for table in tables(root))


def test_the_page_in_the_repository_is_up_to_date():
    assert (ROOT / "SETTINGS.md").read_text() == f"{markdown_page()}\n", (
        "run: asyncflow settings --format markdown > SETTINGS.md"
    )


def test_a_key_has_its_bounds_default_and_meaning():
    assert one("loss.clip_low") == Setting("loss.clip_low", "number, 0 to 1", "0.2", one("loss.clip_low").meaning)
    assert (one("steps").type, one("steps").default) == ("integer, 1 or more", "")
    assert one("runtime").type == '"local" or "ray"'
    assert one("models.policy.lora.targets").type == "list of text"
    assert not any(f"{LARGEST:g}" in setting.type for table in tables("recipe") for setting in table.settings)


def test_a_comment_above_a_field_is_a_part_of_its_meaning():
    assert one("loss.old").meaning.startswith("The ratio divides by")
    assert one("loss.old").meaning.endswith("which may be older.")
    assert not one("loss.tis_cap").meaning.startswith("The ratio")


def test_inherited_keys_and_the_defaults_of_a_whole_table_are_there():
    assert one("sft.model").meaning == one("reward-model.model").meaning != ""
    assert (one("sft.optimizer.warmup_steps").default, one("optimizer.warmup_steps").default) == ("10", "0")


def test_a_name_of_the_users_own_stands_for_itself():
    assert one("models.policy.path").key == "models.<role>.path"
    assert one("placement.generator.pool").key == "placement.<service>.pool"
    assert one("models.reward.mix.weight").key == "models.<role>.mix[].weight"


def test_a_table_is_found_with_all_that_is_in_it():
    assert [table.key for table in find("models.policy")] == [
        "models.<role>",
        "models.<role>.mix[]",
        "models.<role>.lora",
    ]
    assert [table.key for table in find("sft")] == [table.key for table in tables("sft")]


def test_what_an_algorithm_makes_of_a_table_is_there():
    *_, arguments, losses = tables("recipe")
    defaults = {(setting.key, setting.default): setting.meaning for setting in arguments.settings + losses.settings}
    assert "ppo" in defaults["advantage.gae_lambda", "0.95"].split(", ")
    assert defaults["loss.clip_high", "0.28"] == "dapo"
    assert [table.key for table in find("advantage.gae_lambda")] == [arguments.key]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("loss.clip_lo", "did you mean 'loss.clip_low'?"),
        ("clip_low", "did you mean 'loss.clip_low'?"),
        ("models.critic.learning_rat", "did you mean 'models.critic.learning_rate'?"),
        ("sft.schedule.step", "did you mean 'sft.schedule.steps'?"),
        ("zzz", "`asyncflow settings` prints all"),
        ("sft.zzz", "`asyncflow settings sft` prints all"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(asked: str, hint: str):
    with pytest.raises(BadInput) as refused:
        find(asked)
    assert str(refused.value) == f"settings: no key {asked}, {hint}"
