"""A rule that is changed during a run may ask only for what the run has read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.checks import Checked, check
from asyncflow.recipe.rule_reloads import check_reloaded_rules
from protocols.control.code import CodeSource
from tests.asyncflow.conftest import MakeRecipe
from workers.user_code import BadCode

ROW = {"prompt": "1+1=", "reference": "2", "level": 3, "kind": "sum"}
Reload = Callable[..., None]


def rule(arguments: str) -> str:
    return f"def score({arguments}):\n    return 1.0\n"


@pytest.fixture
def reload(tmp_path: Path, make_recipe: MakeRecipe) -> Reload:
    """Checks a recipe whose rule has the first arguments, then one with the second; the last row lacks some columns."""

    def reload(before: str, after: str, lacks: tuple[str, ...] = (), **changes: Any) -> None:
        file, data = tmp_path / "users_rule.py", tmp_path / "rows.jsonl"
        file.write_text(rule(before))
        last = {name: value for name, value in ROW.items() if name not in lacks}
        data.write_text("".join(json.dumps(row) + "\n" for row in (ROW, last)))
        given = {"models": {"reward": {"rule": f"{file}:score"}}, "data": {"train": str(data), "eval": ""}}
        checked: Checked = check(make_recipe(**given | changes))
        check_reloaded_rules(checked, [CodeSource(str(file), str(file), rule(after))])

    return reload


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("response, level", "response, reference"),
        ("response, level", "response, level=0, factor=2.0"),
        ("response, **columns", "response, level, kind"),
        ("response, **columns", "response, kind='sum', **columns"),
        ("response, level, kind", "completions, level"),
        ("response", "data_source, solution_str, ground_truth"),
    ],
)
def test_what_the_run_has_read_may_be_asked_for(reload: Reload, before: str, after: str):
    reload(before, after)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("response", "response, level, topic", "level, topic"),
        ("response, level", "response, level, kind", "kind"),
        ("response, level=0", "response, level, reference", "level"),
        ("response, level", "response, kind='sum'", "kind"),
        ("response, level", "response, **columns", "kind"),
    ],
)
def test_columns_that_some_row_lacks_or_nobody_reads_are_named(reload: Reload, before: str, after: str, named: str):
    with pytest.raises(
        BadCode, match=rf"score asks for {named}, which the run does not have for every row of .*rows\.j"
    ):
        reload(before, after, lacks=("level",) if "level=0" in before else ())


def test_a_reference_that_no_row_has_is_named(reload: Reload, tmp_path: Path):
    rows = tmp_path / "plain.jsonl"
    rows.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(BadCode, match="score asks for reference, which"):
        reload("response", "response, reference", data={"train": str(rows), "eval": ""})


def test_a_rule_that_does_not_load_is_refused_with_what_it_raises(reload: Reload):
    with pytest.raises(BadCode, match=r"users_rule\.py:1 raised SyntaxError"):
        reload("response", "response, response")
