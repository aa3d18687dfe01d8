"""What the README shows a newcomer works: its recipes, its Python, its commands, its files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from asyncflow.cli.main import app
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.recipe.config import to_recipe
from asyncflow.recipe.model_checks import check_placement, check_roles

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's code blocks in a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_recipe_is_one_that_runs_after_the_demonstration():
    recipe = to_recipe(tomllib.loads(blocks("toml")[0]))
    dataflow = trace(algorithm_named(recipe.algorithm))
    check_roles(recipe, dataflow)
    check_placement(recipe, dataflow)
    demo = tomllib.loads((ROOT / "deploy/recipes/sorting/ppo.toml").read_text())
    assert recipe.models["policy"].path == demo["models"]["policy"]["path"]
    assert (recipe.data.train, recipe.data.eval) == (demo["data"]["train"], demo["data"]["eval"])


def test_the_tables_of_ones_own_model_data_and_reward_are_those_of_a_recipe():
    sizes = {"name": "own", "algorithm": "grpo", "steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2}
    recipe = to_recipe(sizes | tomllib.loads(blocks("toml")[1]))
    assert recipe.models["policy"].dtype == "bfloat16"


def test_the_placements_on_several_gpus_are_placements():
    base = tomllib.loads(blocks("toml")[0])
    for line in blocks("toml")[2].strip().splitlines():
        placement = tomllib.loads(line)["policy"]
        table = base | {"pools": {"train": {"devices": 4}}, "placement": {"policy": placement}}
        recipe = to_recipe(table | {"generation": {"engine": "torch", "max_tokens": 8}})
        check_placement(recipe, trace(algorithm_named(recipe.algorithm)))


@pytest.mark.parametrize("source", blocks("python"))
def test_python_on_the_page_compiles(source: str):
    compile(f"async def page():\n{re.sub('^', '    ', source, flags=re.MULTILINE)}", "README.md", "exec")


def test_commands_on_the_page_exist():
    named = set(re.findall(r"^asyncflow (\S+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert named
    assert named <= get_command(app).commands.keys()  # type: ignore[attr-defined]


def test_files_and_extras_on_the_page_are_there():
    for path in re.findall(r"`((?:asyncflow|protocols|workers|deploy|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"'\.\[([\w,]+)\]'", PAGE):
        assert set(group.split(",")) <= extras.keys()
