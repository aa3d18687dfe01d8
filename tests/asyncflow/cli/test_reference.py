"""`asyncflow settings` as its user reads it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from asyncflow.cli.main import app
from asyncflow.recipe.reference import ROOTS, markdown_page


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["settings", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_key_is_printed_with_type_default_and_meaning():
    words = printed("loss.dual_clip").split()
    assert {"[loss]", "dual_clip", "number", "3.0", "bound"} <= set(words)


def test_without_a_key_all_of_a_recipe_is_printed():
    text = printed()
    assert all(f"[{table}]" in text for table in ("data", "models.<role>", "loss", "deadlines", "placement.<service>"))


def test_json_and_markdown_have_all_files():
    assert set(json.loads(printed("--format", "json"))) == set(ROOTS)
    assert printed("--format", "markdown").rstrip() == markdown_page().rstrip()
    assert json.loads(printed("sft.schedule.steps", "--format", "json"))[0]["settings"][0]["key"] == "schedule.steps"
