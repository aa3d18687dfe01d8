"""A module is rebuilt from new source text, and the running one is unchanged until the switch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protocols.control.requests import CodeSource
from workers.losses import POLICY_LOSSES
from workers.losses.tokens import Surrogate
from workers.losses.validate_loss import validate_loss
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest
from workers.settings import Loss
from workers.user_code import BadCode, UserFunction, digest_of, module_of, new_module, source_of

NAME = "code_of_a_user"
TEXT = """
from __future__ import annotations
import msgspec

class State(msgspec.Struct):
    count: Other
class Other(msgspec.Struct):
    n: int = {n}

def value(*texts):
    return msgspec.convert({{"count": {{}}}}, State).count.n
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / f"{NAME}.py"
    path.write_text(TEXT.format(n=1))
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(NAME, None)


def source(path: Path, text: str) -> CodeSource:
    return CodeSource(NAME, str(path), text)


def no_check(function: Any) -> None:
    function()


def test_a_name_has_a_module_where_it_is_no_registered_one():
    assert (module_of("a.b:c"), module_of("ppo")) == ("a.b", "")


def test_a_source_is_the_file_as_it_is_and_its_digest_its_text(file: Path):
    before = source_of(NAME)
    assert before == source(file, TEXT.format(n=1))
    file.write_text(TEXT.format(n=2))
    assert source_of(NAME).text == TEXT.format(n=2)
    assert digest_of(source_of(NAME)) != digest_of(before)


@pytest.mark.parametrize("module", ["nothing_of_this_name", "sys", "nothing.below.it"])
def test_a_module_without_a_file_is_refused(module: str):
    with pytest.raises(BadCode, match=f"module {module}"):
        source_of(module)


def test_a_module_made_anew_stands_beside_the_imported_one(file: Path):
    imported = importlib.import_module(NAME)
    assert imported.value() == 1
    with new_module(source(file, TEXT.format(n=2))) as made:
        assert sys.modules[NAME] is made
        assert (made.value(), imported.value()) == (2, 1)
    assert sys.modules[NAME] is imported


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = (", r"\.py:1 raised SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_module_raises_is_told_and_the_imported_one_stays(file: Path, text: str, complaint: str):
    imported = importlib.import_module(NAME)
    with pytest.raises(BadCode, match=complaint):
        new_module(source(file, text)).__enter__()
    assert sys.modules[NAME] is imported


def test_a_function_changes_with_the_switch_only(file: Path):
    function = UserFunction(f"{NAME}:value", importlib.import_module(NAME).value, no_check)
    function.prepare([source(file, TEXT.format(n=2))])
    assert function.current() == 1
    function.switch(take=False)
    function.switch(take=True)  # a removed definition is gone
    assert function.current() == 1
    function.prepare([CodeSource("another", "another.py", "1 / 0"), source(file, TEXT.format(n=3))])
    function.switch(take=True)
    assert function.current() == 3
    assert sys.modules[NAME].value() == 3


def test_a_function_that_fails_its_trial_is_refused_with_its_error(file: Path):
    function = UserFunction(f"{NAME}:value", importlib.import_module(NAME).value, no_check)
    with pytest.raises(BadCode, match=f"{NAME}:value failed its check with NameError: name 'nothing'"):
        function.prepare([source(file, "def value(): return nothing")])
    with pytest.raises(BadCode, match="raised SystemExit: 4"):
        function.prepare([source(file, "def value(): raise SystemExit(4)")])
    with pytest.raises(BadCode, match="has no function 'value'"):
        function.prepare([source(file, "")])
    function.switch(take=True)
    assert function.current() == 1


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_losses_that_come_along_pass_the_trial(name: str):
    validate_loss(POLICY_LOSSES[name], Loss(policy=name))


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda tokens, settings: tokens.log_probs, "returned Tensor, want a Surrogate"),
        (lambda tokens, settings: Surrogate(tokens.log_probs[:2], tokens.mask[:2]), "returned shapes"),
        (lambda tokens, settings: Surrogate((tokens.log_probs * torch.inf), tokens.mask), "its gradient is"),
    ],
)
def test_a_loss_with_a_wrong_answer_fails_the_trial(loss: Any, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        validate_loss(loss, Loss())


def test_a_rules_process_runs_the_text_that_it_was_given_whatever_the_file_says_by_then(file: Path):
    process = RuleProcess(f"{NAME}:value", 5.0, source_of(NAME))
    file.write_text("broken (")
    row = RuleRequest("", "", "")
    try:
        assert process.score(row) == 1.0
        process.close()  # as after a timeout: the next row starts a new process
        assert process.score(row) == 1.0
    finally:
        process.close()


def test_a_rule_that_cant_be_loaded_does_not_start(file: Path):
    process = RuleProcess(f"{NAME}:value", 5.0, source(file, "1 / 0"))
    with pytest.raises(RuleFailed, match="ZeroDivisionError"):
        process.start()
    assert process.pid is None
