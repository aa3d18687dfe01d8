"""Rules score texts; a rule's name is resolved to a function or refused with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from workers.rewards.rules import RULES, exact_match, excess_characters, prefix_match, rule_named


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module and two broken modules."""
    (tmp_path / "rules_of_a_user.py").write_text("PI = 3\ndef half(prompt, response, reference):\n    return 0.5\n")
    (tmp_path / "rules_with_a_mistake.py").write_text("undefined_name\n")
    (tmp_path / "rules_with_bad_syntax.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rules_of_a_user", raising=False)
    return "rules_of_a_user"


@pytest.mark.parametrize(
    ("response", "reference", "exact", "prefix", "excess"),
    [
        ("42", "42", 1, 1, 0),
        (" 42\n", "42 ", 1, 1, 0),
        ("43", "42", 0, 1 / 2, 0),
        ("421", "42", 0, 2 / 3, 1),  # text after the right answer lowers the score
        ("4", "42", 0, 1 / 2, 0),  # a penalty below zero would reward an empty response
        ("24", "42", 0, 0, 0),
        ("", "42", 0, 0, 0),
    ],
)
def test_scores(response: str, reference: str, exact: float, prefix: float, excess: float):
    assert exact_match("6*7=", response, reference) == exact
    assert prefix_match("6*7=", response, reference) == pytest.approx(prefix)
    assert excess_characters("6*7=", response, reference) == excess


def test_a_name_is_registered_or_a_users_function(user_module: str):
    assert rule_named("exact_match") is RULES["exact_match"]
    assert rule_named(f"{user_module}:half")("", "", "") == 0.5


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exact_mach", "is none of exact_match, prefix_match, excess_characters, math_verify and no package.module"),
        (":half", "no package.module:function or file.py:function"),
        ("rules_of_a_user:", "no package.module:function or file.py:function"),
        ("rules_of_nobody:half", "No module named 'rules_of_nobody'"),
        ("rules_of_a_user:third", r"module rules_of_a_user \(.*/rules_of_a_user.py\) has no function 'third'"),
        ("rules_of_a_user:PI", "has no function 'PI'"),
        ("rules_with_a_mistake:half", "raised NameError: name 'undefined_name'"),
        ("rules_with_bad_syntax:half", "raised SyntaxError"),
    ],
)
def test_a_name_that_finds_nothing_says_why(user_module: str, name: str, says: str):
    with pytest.raises(LookupError, match=says):
        rule_named(name)
