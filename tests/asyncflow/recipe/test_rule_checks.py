"""Each rule of a recipe is called once before the run: a mistake is one sentence, not a failure of every sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.checks import Checked, check
from asyncflow.recipe.config import BadInput, load_recipe, recipe_text, to_recipe
from tests import tiny

RULES = """
def as_bool(prompt, response, reference):
    return response.strip() == reference.strip()

def as_verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": 1, "pred": solution_str}

def as_trl(completions, **columns):
    assert columns["level"] == [3] * len(completions), columns
    return [1.0 for _ in completions]

async def as_async(response):
    return 1.0

def nothing(response):
    return None

def first_word(response):
    return float(response.split()[0] == "1")

def by_level(response, level, hint=""):
    return level

def by_topic(response, topic):
    return 1.0

def of_chat(messages):
    return float(messages == [{"role": "user", "content": "1+1="}])

def away(response):
    raise ConnectionRefusedError("no judge here")
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny.make_policy(tmp_path_factory.mktemp("policy"), layers=1)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def checked(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checked]:
    """Checks a GRPO recipe in its folder, with these rules beside it in my_own_rules.py."""
    (tmp_path / "my_own_rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)

    def make(rule: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Checked:
        rows = rows or [{"prompt": "1+1=", "reference": "2", "level": 3}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        table = {
            "name": "rules",
            "algorithm": "rloo",
            "steps": 1,
            "prompts_per_step": 1,
            "samples_per_prompt": 2,
            "data": {"train": "rows.jsonl"},
            "models": {
                "policy": {"path": policy, "learning_rate": 1e-3},
                "reference": {"path": policy},
                "reward": {"rule": rule, **changes.pop("reward", {})},
            },
            "generation": {"engine": "torch", "max_tokens": 4},
            "placement": {},
            **changes,
        }
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(recipe_text(to_recipe(table)))
        return check(load_recipe(recipe))

    return make


def columns(checked: Checked) -> dict[str, Any]:
    """The columns that travel with the first row."""
    text = checked.train.first().columns.text(0)
    return json.loads(text) if text else {}


@pytest.mark.parametrize("function", ["as_bool", "as_async", "as_verl"])
def test_a_rule_beside_the_recipe_is_found_tried_and_accepted(checked: Callable[..., Checked], function: str):
    assert columns(checked(f"my_own_rules:{function}")) == {}
    assert columns(checked(f"my_own_rules.py:{function}")) == {}


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (
            "my_own_rules:nothing",
            r"models.reward.rule = 'my_own_rules:nothing': on the first row of .*/rows.jsonl, with its reference as "
            r"response, rule my_own_rules:nothing returned None, want a number, or a dictionary of numbers; correct",
        ),
        ("my_own_rules:first_word", "with nothing as response, .* raised IndexError: list index out of range"),
        ("my_own_rules:third", r"models.reward.rule: .*my_own_rules.py has no function 'third'"),
        (
            "their_rules:third",
            r"models.reward.rule: .*No module named 'their_rules'; searched on Python's path and in /",
        ),
        ("their_rules.py:third", r"models.reward.rule: .*there is no file /.*/their_rules.py"),
        ("exact_mach", "models.reward.rule: .*'exact_mach' is none of exact_match, prefix_match"),
        (
            "json:score",
            r"module json is .*json/__init__.py, and there is /.*/json.py too: rename one, or",
        ),
        (
            "my_own_rules:by_topic",
            r"it asks for 'topic', which .*rows.jsonl:1 lacks; .* columns of the data: 'prompt', 'reference', 'level'",
        ),
    ],
)
def test_a_rule_that_can_not_score_is_refused_with_one_sentence(
    checked: Callable[..., Checked], tmp_path: Path, rule: str, complaint: str
):
    if rule.startswith("json"):
        (tmp_path / "json.py").write_text("def score(response): return 1.0\n")
    with pytest.raises(BadInput, match=complaint) as refused:
        checked(rule)
    assert "\n" not in str(refused.value)


def test_a_rule_that_needs_the_run_is_loaded_and_not_called(checked: Callable[..., Checked]):
    with pytest.raises(BadInput, match=r"ConnectionRefusedError: no judge here; .* set check = false beside it"):
        checked("my_own_rules:away", failures={"reward_backoff_seconds": 0})
    checked("my_own_rules:away", reward={"check": False})


def test_the_columns_that_a_rule_asks_for_travel_with_the_rows_and_no_others(checked: Callable[..., Checked]):
    rows = [{"prompt": "1+1=", "level": 3, "topic": "sums"}]
    assert columns(checked("my_own_rules:by_level", rows)) == {"level": 3}
    assert columns(checked("my_own_rules:as_trl", rows)) == {"level": 3, "topic": "sums"}


def test_a_rule_that_takes_no_reference_needs_none_and_a_later_row_without_a_column_is_named(
    checked: Callable[..., Checked],
):
    checked("my_own_rules:as_async", [{"prompt": "1+1="}])
    with pytest.raises(BadInput, match="no field 'reference'"):
        checked("my_own_rules:as_bool", [{"prompt": "1+1="}])
    with pytest.raises(BadInput, match=r"rows.jsonl:2 lacks"):
        checked("my_own_rules:by_level", [{"prompt": "1+1=", "level": 3}, {"prompt": "1+2="}])


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_chat_prompt_is_there_as_messages_for_a_rule_that_asks(checked: Callable[..., Checked], column: str):
    chat = [{"role": "user", "content": "1+1="}]
    assert columns(checked("my_own_rules:of_chat", [{column: chat}])) == {"messages": chat}
    assert columns(checked("my_own_rules:as_async", [{column: chat}])) == {}
