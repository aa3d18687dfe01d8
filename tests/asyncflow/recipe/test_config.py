"""Recipes: every key and value is checked, and an error names the place, the value and the valid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.config import BadInput, load_recipe, recipe_text, to_recipe

TEXT = """
name = "small"
steps = 3
prompts_per_step = 2
samples_per_prompt = 4
[data]
train = "train.jsonl"
[models]
policy = { path = "models/policy", learning_rate = 1e-4 }
[pools]
train = { devices = 1 }
[delays.reward]
score = 0.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(TEXT)
    return file


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ").removeprefix(f"recipe {path}: ")


def test_a_recipe_is_read_with_its_defaults(path: Path):
    recipe = load_recipe(path)
    assert (recipe.steps, recipe.samples_per_step, recipe.staleness, recipe.runtime) == (3, 8, 0, "ray")
    assert recipe.models["policy"].learning_rate == 1e-4
    assert recipe.data.prompt == "prompt"
    assert recipe.delays == {"reward": {"score": 0.5}}


def test_a_recipe_may_start_with_a_byte_order_mark_and_have_windows_line_ends(path: Path):
    recipe = load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert load_recipe(path) == recipe


def test_a_resolved_recipe_reads_as_itself(path: Path, tmp_path: Path):
    recipe = load_recipe(path, ["advantage.gamma=0.9", "advantage.kl_estimator=k2", "placement.policy.pool=train"])
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(recipe_text(recipe))
    assert load_recipe(resolved) == recipe
    assert "clip_low" in resolved.read_text(), "defaults are written out"


def test_a_mixed_reward_is_read_and_written_part_by_part(path: Path, tmp_path: Path):
    mix = """[{ name = "right", rule = "exact_match" }, { name = "liked", path = "models/r", weight = 0.5 }]"""
    recipe = load_recipe(path, [f"models.reward.mix={mix}"])
    model = recipe.models["reward"]
    assert [(part.name, part.weight) for part in model.mix] == [("right", 1.0), ("liked", 0.5)]
    assert (model.rules, model.folders) == (["exact_match"], ["models/r"])
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(recipe_text(recipe))
    assert load_recipe(resolved) == recipe


def test_an_unknown_key_of_a_part_is_named_with_its_number(path: Path):
    said = refused(path, """models.reward.mix=[{ name = "right", rule = "exact_match", wight = 2.0 }]""")
    assert said == "unknown key models.reward.mix.0.wight, did you mean 'weight'?"


@pytest.mark.parametrize(
    ("overrides", "correction"),
    [
        (["staleness=0"], "none"),
        (["staleness=2"], "tis"),
        (["staleness=2", "algorithm=grpo"], "tis"),
        (["staleness=2", "loss.correction=icepop"], "icepop"),
        (["staleness=2", "loss.correction=none"], "none"),
        (["staleness=2", "loss.old=mu"], "none"),  # the ratio itself is to the generating policy
    ],
)
def test_samples_that_may_be_stale_are_weighed_unless_the_recipe_says_otherwise(
    path: Path, overrides: list[str], correction: str
):
    assert load_recipe(path, overrides).loss.correction == correction


# --- unknown keys, at every level


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=1", "unknown key step, did you mean 'steps'?"),
        ("data.trian='x'", "unknown key data.trian, did you mean 'train'?"),
        ("models.policy.learning_rat=1", "unknown key models.policy.learning_rat, did you mean 'learning_rate'?"),
        ("pools.train.devces=2", "unknown key pools.train.devces, did you mean 'devices'?"),
        ("placement.policy.pol='train'", "unknown key placement.policy.pol, did you mean 'pool'?"),
        ("generation.max_token=1", "unknown key generation.max_token, did you mean 'max_tokens'?"),
        ("deadlines.zzz=1", "unknown key deadlines.zzz; known: answer, checkpoint, give_up, publish, stall, stop"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_known_one(path: Path, override: str, message: str):
    assert refused(path, override) == message


# --- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=7", 7),
        ("folder=other", "other"),  # a bare word is a string
        ('folder="o t"', "o t"),
        ("folder=a=b", "a=b"),
        ("deterministic=true", True),
    ],
)
def test_an_override_replaces_a_value(path: Path, override: str, value: Any):
    assert getattr(load_recipe(path, [override]), override.partition("=")[0]) == value


def test_overrides_reach_into_tables_and_make_those_that_are_not_there(path: Path):
    recipe = load_recipe(path, ["models.policy.path=/m/n.o", "models.critic.learning_rate=1e-3", "loss.epochs=2"])
    assert recipe.models["policy"].path == "/m/n.o"
    assert recipe.models["policy"].learning_rate == 1e-4
    assert recipe.models["critic"].learning_rate == 1e-3
    assert recipe.loss.epochs == 2


def test_the_last_override_wins(path: Path):
    assert load_recipe(path, ["steps=7", "steps=8"]).steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set 'steps': want key.path=value"),
        ("=3", "--set '=3': want key.path=value"),
        ("data.train.file=x", "--set 'data.train.file=x': train is a value, not a table"),
        ("steps=many", "Expected `int`, got `str` - at `$.steps`"),
        ("steps=1.5", "Expected `int`, got `float` - at `$.steps`"),
        ("data=5", "Expected `object`, got `int` - at `$.data`"),
        ("runtime=threads", "Invalid enum value 'threads' - at `$.runtime`"),
        ("pools.train.devices=0", "pools.train.devices = 0: want 1 or more"),
    ],
)
def test_an_override_that_means_nothing_is_refused(path: Path, override: str, message: str):
    assert refused(path, override) == message


# --- files and values


def test_a_recipe_that_is_not_there(tmp_path: Path):
    assert refused(tmp_path / "none.toml") == "can't be read: No such file or directory"
    assert refused(tmp_path) == "can't be read: Is a directory"


def test_a_recipe_that_is_no_toml(path: Path):
    path.write_text("steps = = 3")
    assert "at line 1, column 9" in refused(path)
    path.write_bytes(b"name = '\xff'")
    assert "can't decode byte 0xff" in refused(path)


def test_a_required_key_that_is_missing_is_named(path: Path):
    path.write_text(TEXT.replace('name = "small"', ""))
    assert refused(path) == "Object missing required field `name`"


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("steps=0", 1),
        ("prompts_per_step=-1", 1),
        ("samples_per_prompt=0", 1),
        ("threads=0", 1),
        ("staleness=-1", 0),
        ("seed=-1", 0),  # numpy would refuse it at the first prompt
        ("firing_rows=0", 1),  # a stage would fire on nothing, forever
        ("mailbox_rows=-1", 0),
        ("max_refills=-1", 0),
        ("generation.max_tokens=0", 1),
        ("generation.slots=0", 1),  # nothing would ever be generated
        ("loss.epochs=0", 1),
        ("loss.mini_batches=0", 1),
        ("loss.tokens_per_micro_batch=0", 1),
        ("checkpoints.every=-1", 0),
        ("checkpoints.keep=-1", 0),  # the newest would be removed
        ("evaluation.every=-2", 0),
        ("failures.reward_retries=-1", 0),
    ],
)
def test_a_size_below_its_least_is_refused(path: Path, override: str, least: int):
    key, _, value = override.partition("=")
    assert refused(path, override) == f"{key} = {value}: want {least} or more"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "o t", "x" * 101])
def test_a_name_that_makes_no_folder_is_refused(path: Path, name: str):
    assert refused(path, f'name="{name}"').startswith(f"name = {name!r}: it becomes a folder's name")


def test_a_table_may_come_from_a_program():
    with pytest.raises(BadInput, match="recipe: unknown key nam, did you mean 'name'"):
        to_recipe({"nam": "x"})
