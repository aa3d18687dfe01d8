"""Whatever a rule does in its process, its row fails with the reason and the next row gets its score."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workers.rewards import sandbox
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest

RULES = '''
import os, subprocess, sys, time
import numpy as np

print("imported")

def obey(prompt, response, reference):
    """Does what the prompt says."""
    match prompt:
        case "length": return len(response)
        case "float32": return np.float32(0.25)
        case "raise": raise ValueError("no " + response)
        case "raise long": raise ValueError("x" * 1_000_000)
        case "raise surrogate": raise ValueError("\\udc80")
        case "exit": os._exit(3)
        case "sys.exit": sys.exit(4)
        case "crash": os.abort()
        case "hang": time.sleep(600)
        case "none": return None
        case "nan": return float("nan")
        case "infinite": return -float("inf")
        case "text": return "0.5"
        case "bool": return True
        case "too big for float32": return 1e300
        case "too big for float": return 10**400
        case "unprintable": return type("Value", (), {"__repr__": lambda self: 1 / 0})()
        case "pid": return os.getpid()
        case "print":
            print("noise", flush=True)
            sys.__stdout__.write("noise")
            os.write(1, b"noise")
            subprocess.run(["echo", "noise"], check=True)
            return 0.5
        case "read": return len(sys.stdin.read()) + len(os.read(0, 10)) + 0.5
        case "input": return float(input())
        case "start": return subprocess.Popen(["sleep", "600"]).pid
'''
LENGTH = RuleRequest("length", "abc", "")


def ask(what: str) -> RuleRequest:
    return RuleRequest(what, "it", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path with the rules above."""
    path = tmp_path_factory.mktemp("sandboxed")
    (path / "rules_to_obey.py").write_text(RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        yield path


@pytest.fixture(scope="module")
def rule(folder: Path) -> Iterator[RuleProcess]:
    """One sandbox for all tests, which must survive what each of them does to it."""
    process = RuleProcess("rules_to_obey:obey", timeout_seconds=5)
    yield process
    process.close()


@pytest.fixture
def open_rule(folder: Path) -> Iterator[Callable[..., RuleProcess]]:
    opened: list[RuleProcess] = []

    def start(name: str, timeout_seconds: float = 5) -> RuleProcess:
        opened.append(RuleProcess(name, timeout_seconds))
        return opened[-1]

    yield start
    for process in opened:
        process.close()


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int, within_seconds: float = 5) -> bool:
    deadline = time.monotonic() + within_seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("what", "score"),
    [("length", 2.0), ("float32", 0.25), ("print", 0.5), ("read", 0.5)],
)
def test_a_score_whatever_is_printed_or_read_on_the_way(rule: RuleProcess, what: str, score: float):
    assert rule.score(ask(what)) == score
    assert rule.score(LENGTH) == 3.0


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("raise", "raised ValueError: no it"),
        ("raise surrogate", r"raised ValueError: \\udc80"),
        ("none", "returned None, want a number"),
        ("text", "returned '0.5', want a number"),
        ("bool", "returned True, want a number"),
        ("nan", "returned nan, want a finite number"),
        ("infinite", "returned -inf, want a finite number"),
        ("too big for float32", r"returned 1e\+300, want a finite number that float32 holds"),
        ("too big for float", "raised OverflowError"),
        ("unprintable", "raised ZeroDivisionError"),
        ("input", "raised EOFError"),
        ("sys.exit", "raised SystemExit: 4"),
    ],
)
def test_no_score_is_a_cause_and_the_process_lives_on(rule: RuleProcess, what: str, cause: str):
    rule.score(LENGTH)
    pid = rule.pid
    with pytest.raises(RuleFailed, match=f"rule rules_to_obey:obey {cause}"):
        rule.score(ask(what))
    assert rule.score(LENGTH) == 3.0
    assert rule.pid == pid


def test_a_long_cause_is_cut(rule: RuleProcess):
    with pytest.raises(RuleFailed) as failed:
        rule.score(ask("raise long"))
    assert len(str(failed.value)) < 400


@pytest.mark.parametrize(("what", "cause"), [("exit", "exit code 3"), ("crash", "signal SIGABRT")])
def test_a_rule_that_ends_its_process_costs_its_own_row_only(rule: RuleProcess, what: str, cause: str):
    with pytest.raises(RuleFailed, match=f"ended its process, {cause}"):
        rule.score(ask(what))
    assert rule.score(LENGTH) == 3.0


def test_a_process_killed_between_two_rows_fails_one_of_them(rule: RuleProcess):
    rule.score(LENGTH)
    assert rule.pid is not None
    os.kill(rule.pid, signal.SIGKILL)
    assert ends(rule.pid)
    with pytest.raises(RuleFailed, match="ended its process, signal SIGKILL"):
        rule.score(LENGTH)
    assert rule.score(LENGTH) == 3.0


@pytest.mark.parametrize("rows_before", [0, 1])
def test_a_hanging_rule_is_killed_at_its_deadline_whichever_row_it_hangs_in(
    open_rule: Callable[..., RuleProcess], rows_before: int
):
    rule = open_rule("rules_to_obey:obey", timeout_seconds=0.5)
    for _ in range(rows_before):
        rule.score(LENGTH)
    hanging = rule.pid
    began = time.monotonic()
    with pytest.raises(RuleFailed, match=r"gave no answer within 0\.5 s"):
        rule.score(ask("hang"))
    assert time.monotonic() - began < 20  # includes the start of the process
    assert rule.pid is None
    assert hanging is None or ends(hanging)
    assert rule.score(LENGTH) == 3.0


def test_texts_larger_than_a_pipe_arrive_whole(rule: RuleProcess):
    assert rule.score(RuleRequest("length", "ä" * 1_000_000, "")) == 1_000_000


def test_close_leaves_no_process_behind_not_even_those_that_the_rule_started(open_rule: Callable[..., RuleProcess]):
    rule = open_rule("rules_to_obey:obey")
    pids = [int(rule.score(ask("pid"))), int(rule.score(ask("start")))]
    assert all(is_running(pid) for pid in pids)
    rule.close()
    assert all(ends(pid) for pid in pids)
    rule.close()  # closing twice is harmless


def test_the_child_leaves_when_its_requests_end(open_rule: Callable[..., RuleProcess]):
    rule = open_rule("exact_match")
    rule.score(LENGTH)
    child, pid = rule._child, rule.pid
    assert child is not None
    assert child.stdin is not None
    assert pid is not None
    child.stdin.close()
    assert ends(pid)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_module_that_nobody_wrote", "No module named 'a_module_that_nobody_wrote'"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("", "has no function 'obey'"),
    ],
)
def test_a_module_that_does_not_load_tells_every_row_why(
    folder: Path, open_rule: Callable[..., RuleProcess], source: str, cause: str
):
    (folder / "rules_that_fail.py").write_text(source)
    rule = open_rule("rules_that_fail:obey")
    pids = set()
    for _ in range(2):
        with pytest.raises(RuleFailed, match=cause):
            rule.score(LENGTH)
        pids.add(rule.pid)
    assert len(pids) == 1  # without starting a process each time


def test_a_slow_import_counts_against_the_start_not_the_first_row(folder: Path, open_rule: Callable[..., RuleProcess]):
    (folder / "rules_in_no_hurry.py").write_text("import time; time.sleep(1)\ndef obey(*texts): return 1\n")
    assert open_rule("rules_in_no_hurry:obey", timeout_seconds=0.5).score(LENGTH) == 1.0


def test_an_import_that_never_ends_is_given_up(
    folder: Path, open_rule: Callable[..., RuleProcess], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.5)
    (folder / "rules_for_ever.py").write_text("import time; time.sleep(600)\n")
    rule = open_rule("rules_for_ever:obey")
    with pytest.raises(RuleFailed, match=r"was not ready within 0\.5 s"):
        rule.score(RuleRequest("", "x" * 1_000_000, ""))
    assert rule.pid is None
