"""A module is rebuilt from new source text, and the running one is unchanged until the switch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protocols.control.code import CodeSource
from workers import user_code
from workers.losses import POLICY_LOSSES
from workers.losses.tokens import Surrogate
from workers.losses.validate_loss import validate_loss
from workers.rewards.arguments import RuleRow
from workers.rewards.sandbox_pool import RuleFailed, SandboxPool
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
    with pytest.raises(BadCode, match=f"module.* '?{module}"):
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
    process = SandboxPool(f"{NAME}:value", source_of(NAME), timeout_seconds=5)
    file.write_text("broken (")
    row = RuleRow("", "", "")
    try:
        assert process.score([row])[0].score == 1.0
        process.close()  # as after a timeout: the next row starts a new process
        assert process.score([row])[0].score == 1.0
    finally:
        process.close()


def test_a_rule_that_cant_be_loaded_does_not_start(file: Path):
    process = SandboxPool(f"{NAME}:value", source(file, "1 / 0"), timeout_seconds=5)
    with pytest.raises(RuleFailed, match="ZeroDivisionError"):
        process.start()
    assert process.pids == []


# --- where a module is found


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two folders with a module of one name; Python's path is what it was afterwards."""
    path, own, ours = list(sys.path), list(user_code._FOLDERS), set(user_code._OURS)
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module_beside.py").write_text(f"def value(*texts): return {number}\n")
    yield tmp_path / "first", tmp_path / "second"
    sys.path[:], user_code._FOLDERS[:], user_code._OURS = path, own, ours
    sys.modules.pop("module_beside", None)


def named(name: str) -> Any:
    return user_code.function_named(name, {}, "rule")


def test_a_module_and_a_file_are_found_in_the_folders_of_the_recipe_loaded_last(folders: tuple[Path, Path]):
    first, second = map(str, folders)
    user_code.search_in([first])
    assert source_of("module_beside").path == source_of("module_beside.py").path == f"{first}/module_beside.py"
    assert named("module_beside.py:value")() == 0
    user_code.search_in([second])
    assert source_of("module_beside").path == source_of("module_beside.py").path == f"{second}/module_beside.py"
    assert sys.path.index(second) < sys.path.index(first)
    assert user_code.reread(CodeSource("module_beside", f"{first}/module_beside.py", "")).text.endswith("return 0\n")


def test_a_name_that_means_a_library_and_a_file_beside_the_recipe_is_refused(folders: tuple[Path, Path]):
    for module in ("msgspec", "math"):
        (folders[0] / f"{module}.py").write_text("def value(): return 1\n")
    user_code.search_in([str(folders[0])])
    with pytest.raises(
        LookupError, match=r"module msgspec is .*/msgspec/__init__.py, and there is .*/first/msgspec.py"
    ):
        named("msgspec:value")
    with pytest.raises(BadCode, match=r"module math is .*, and there is .*: rename one, or give the file"):
        source_of("math")
    assert named("msgspec.py:value")() == 1
    assert importlib.import_module("msgspec").Struct, "nothing of a library's is replaced"


def test_what_is_not_found_says_where_it_was_searched(folders: tuple[Path, Path]):
    user_code.search_in(map(str, folders))
    with pytest.raises(BadCode, match=f"No module named 'nowhere'; searched on Python's path and in {folders[0]}, "):
        source_of("nowhere")
    with pytest.raises(BadCode, match=f"there is no file {folders[0]}/nowhere.py or {folders[1]}/nowhere.py"):
        source_of("nowhere.py")
