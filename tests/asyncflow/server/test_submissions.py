"""What a recipe may say that comes over HTTP: no code, and nothing outside of the server's root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.inspect import AnyType, DictType, ListType, StrType, StructType, Type, UnionType, type_info

from asyncflow.recipe.config import BadInput, Recipe, recipe_text, to_recipe
from asyncflow.server.submissions import STRINGS, checked_recipe, restarted_recipe

Take = Callable[..., Recipe]


def texts_of(kind: Type, key: str) -> set[str]:
    match kind:
        case StructType(fields=fields):
            return {t for f in fields for t in texts_of(f.type, f"{key}.{f.name}" if key else f.name)}
        case DictType(value_type=inner) | ListType(item_type=inner):
            return texts_of(inner, f"{key}.*")
        case UnionType(types=types):
            return {text for inner in types for text in texts_of(inner, key)}
        case StrType() | AnyType():
            return {key}
        case _:
            return set()


def test_every_text_of_a_recipe_is_something():
    """A new key of a recipe is a name, a path or a function: this table has to say which."""
    assert texts_of(type_info(Recipe), "") == STRINGS.keys() - {"placement"}


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "small",
        "steps": 1,
        "prompts_per_step": 1,
        "data": {"train": "train.jsonl"},
        "models": {"policy": {"path": "models/policy"}, "reward": {"rule": "exact_match"}},
    }


def check(table: dict[str, Any], root: Path, *overrides: str, allow: frozenset[str] = frozenset()) -> Recipe:
    return checked_recipe(table, overrides, root, allow, [])


def resume(table: dict[str, Any], root: Path, *overrides: str, allow: frozenset[str] = frozenset()) -> Recipe:
    """The same overrides, of a run of the recipe that is started again."""
    file = root / "run" / "recipe.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(recipe_text(to_recipe(table)))
    return restarted_recipe(file, overrides, root, allow)


ROUTES = pytest.mark.parametrize("take", [check, resume])


def test_names_and_paths_below_the_root_are_taken(small: dict[str, Any], tmp_path: Path):
    recipe = check(small, tmp_path, "steps=3")
    assert (recipe.steps, recipe.folder, recipe.code) == (3, str(tmp_path), [])


@ROUTES
@pytest.mark.parametrize(
    "override",
    [
        "data={train='/etc/passwd'}",
        'data.train="\\u002fetc/passwd"',
        "data.train='../other.jsonl'",
        "data.train=[{path='/etc/passwd'}]",
        "data.eval={hard='/etc/passwd'}",
        "data.eval={hard={path='link/file'}}",
        "data.pretrain='/etc/passwd'",
        "models.policy.path='/models'",
        "models.reward={mix=[{name='a', path='/models'}]}",
        "pools={main={device='../calibration.json'}}",
        "placement='/plan.toml'",
    ],
)
def test_a_path_outside_of_the_root_is_refused(take: Take, small: dict[str, Any], tmp_path: Path, override: str):
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(BadInput, match=r"want a path below the server's root"):
        take(small, tmp_path, override)


@ROUTES
@pytest.mark.parametrize("path", ["other/endpoint.json", "link", ".server/server.db", "other", "."])
def test_a_file_of_the_servers_or_of_a_run_is_no_data(take: Take, small: dict[str, Any], tmp_path: Path, path: str):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "endpoint.json").touch()
    (tmp_path / "link").symlink_to("other/endpoint.json")
    with pytest.raises(BadInput, match=r"own: want another path|runs are below it"):
        take(small, tmp_path, f"data.train='{path}'")


@ROUTES
@pytest.mark.parametrize(
    "override",
    [
        "algorithm='os:system'",
        "algorithm=os:system",
        'algorithm="os\\u003asystem"',
        "loss={policy='os:system'}",
        "models={reward={rule='/tmp/evil.py:f'}}",
        "observe={trackers=['os:system']}",
        "observe.trackers=['os:system']",
        "loss.policy='os:system'",
        "models.reward={rule='my.py:score'}",
        "models.reward={mix=[{name='a', rule='os:system'}]}",
        "evaluation.metric='os:system'",
        "evaluation.metric=['os:system']",
        "data.eval={hard={path='x', metric='os:system'}}",
    ],
)
def test_code_is_refused_before_it_is_imported_unless_the_server_allows_it(
    take: Take, small: dict[str, Any], tmp_path: Path, override: str
):
    with pytest.raises(BadInput, match="a server runs registered functions only"):
        take(small, tmp_path, override)


@ROUTES
def test_a_function_that_the_server_was_started_with_is_taken(take: Take, small: dict[str, Any], tmp_path: Path):
    allow = frozenset({"my_rules:score"})
    assert take(small, tmp_path, "models.reward={rule='my_rules:score'}", allow=allow).models["reward"].rule


def test_a_run_that_is_started_again_has_the_servers_process_import_nothing(small: dict[str, Any], tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(recipe_text(to_recipe(small)).replace('"ppo"', '"no_such_module:f"'))
    assert restarted_recipe(tmp_path / "recipe.toml", ["steps=7"], tmp_path, frozenset()).steps == 7
    with pytest.raises(BadInput, match="name: a run keeps it"):
        restarted_recipe(tmp_path / "recipe.toml", ["name='other'"], tmp_path, frozenset())


@ROUTES
@pytest.mark.parametrize("override", ["folder='x'", "code=['x']", "ray_address='10.0.0.1:1'", "metrics_host='0.0.0.0'"])
def test_what_is_the_servers_own_is_refused(take: Take, small: dict[str, Any], tmp_path: Path, override: str):
    with pytest.raises(BadInput, match=r"server's own|a run keeps it"):
        take(small, tmp_path, override)
