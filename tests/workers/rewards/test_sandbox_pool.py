"""Whatever a rule does in its process, its row fails with the reason and the others get their scores."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.rewards import sandbox
from workers.rewards.answers import RuleAnswer
from workers.rewards.arguments import RuleRow
from workers.rewards.exchange import LENGTH as LENGTH_OF
from workers.rewards.exchange import Answers, framed
from workers.rewards.sandbox_pool import RuleFailed, SandboxPool

RULES = '''
import fcntl, os, subprocess, sys, time
import numpy as np

print("imported")
kept = []

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
        case "list": return [0.5]
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
        case "print much":
            for _ in range(100): os.write(2, b"noise" * 2000 + b"\\n")
            return 0.5
        case "take memory": kept.append(bytearray(1 << 28)); return 0.5
        case "take much memory": return float(bytearray(1 << 40)[0])
        case "start": return subprocess.Popen(["sleep", "600"]).pid
        case _: write_into_answers(bytes.fromhex(prompt))

def write_into_answers(data):
    """What a C library could do to a descriptor by mistake."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                os.write(number, data)
'''
ONE = RuleAnswer(score=1.0)
LENGTH = RuleRow("length", "abc", "")


class NoScore(Exception):
    """The cause in an answer without a score."""


def score(pool: SandboxPool, row: RuleRow) -> float:
    """The score of one row. Raises NoScore."""
    (answer,) = pool.score([row])
    if answer.score is None:
        raise NoScore(answer.error)
    return answer.score


def ask(what: str) -> RuleRow:
    return RuleRow(what, "it", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path with the rules above."""
    path = tmp_path_factory.mktemp("sandboxed")
    (path / "rules_to_obey.py").write_text(RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        yield path


@pytest.fixture(scope="module")
def rule(folder: Path) -> Iterator[SandboxPool]:
    """One sandbox for all tests, which must survive what each of them does to it."""
    process = SandboxPool("rules_to_obey:obey", timeout_seconds=5)
    yield process
    process.close()


@pytest.fixture
def open_rule(folder: Path) -> Iterator[Callable[..., SandboxPool]]:
    opened: list[SandboxPool] = []

    def start(name: str, timeout_seconds: float = 5, **limits: Any) -> SandboxPool:
        opened.append(SandboxPool(name, timeout_seconds=timeout_seconds, **limits))
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
    ("what", "expected"),
    [("length", 2.0), ("float32", 0.25), ("bool", 1.0), ("print", 0.5), ("read", 0.5)],
)
def test_a_score_whatever_is_printed_or_read_on_the_way(rule: SandboxPool, what: str, expected: float):
    assert score(rule, ask(what)) == expected
    assert score(rule, LENGTH) == 3.0


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("raise", "raised ValueError: no it"),
        ("raise surrogate", r"raised ValueError: \\udc80"),
        ("none", "returned None, want a number, or a dictionary of numbers"),
        ("text", "returned '0.5', want a number"),
        ("list", r"returned \[0.5\], want a number"),
        ("nan", "returned nan, want a finite number"),
        ("infinite", "returned -inf, want a finite number"),
        ("too big for float32", r"returned 1e\+300, want a finite number that float32 holds"),
        ("too big for float", "raised OverflowError"),
        ("unprintable", "raised ZeroDivisionError"),
        ("input", "raised EOFError"),
        ("sys.exit", "raised SystemExit: 4"),
    ],
)
def test_no_score_is_a_cause_and_the_process_lives_on(rule: SandboxPool, what: str, cause: str):
    score(rule, LENGTH)
    pids = rule.pids
    with pytest.raises(NoScore, match=cause):
        score(rule, ask(what))
    assert score(rule, LENGTH) == 3.0
    assert rule.pids == pids


def test_a_long_cause_is_cut(rule: SandboxPool):
    with pytest.raises(NoScore) as failed:
        score(rule, ask("raise long"))
    assert len(str(failed.value)) < 400


@pytest.mark.parametrize(("what", "cause"), [("exit", "exit code 3"), ("crash", "signal SIGABRT")])
def test_a_rule_that_ends_its_process_costs_its_own_row_only(rule: SandboxPool, what: str, cause: str):
    with pytest.raises(NoScore, match=f"ended its process, {cause}"):
        score(rule, ask(what))
    assert score(rule, LENGTH) == 3.0


@pytest.mark.parametrize(
    ("written", "cause"),
    [
        (framed(Answers(1, [RuleAnswer(error="~")])).replace(b"~", b"\xff"), "can't decode byte 0xff"),
        (LENGTH_OF.pack(1) + b"\xc1", "MessagePack data is malformed"),
        (LENGTH_OF.pack(50_004) + b"\x81\xa1a" + b"\x91" * 50_000 + b"\xc0", "maximum recursion depth exceeded"),
        (framed(Answers(7, [ONE])), "an answer to call 7, which is not in flight"),
        (framed(Answers(1, [ONE, ONE])), "2 answers to a call of 1 rows"),
    ],
    ids=["no UTF-8", "no msgpack", "too deep", "no such call", "too many"],
)
def test_a_process_that_writes_no_answer_costs_its_own_row_only(
    open_rule: Callable[..., SandboxPool], written: bytes, cause: str
):
    rule = open_rule("rules_to_obey:obey")
    with pytest.raises(NoScore, match=f"wrote into the answers of its process: .*{cause}"):
        score(rule, ask(written.hex()))
    assert score(rule, LENGTH) == 3.0


def test_an_answer_before_what_is_none_is_kept(open_rule: Callable[..., SandboxPool]):
    rule = open_rule("rules_to_obey:obey")
    assert score(rule, ask((framed(Answers(1, [ONE])) + LENGTH_OF.pack(1) + b"\xc1").hex())) == 1.0
    assert score(rule, LENGTH) == 3.0


def test_a_process_killed_between_two_rows_costs_none_of_them(rule: SandboxPool):
    score(rule, LENGTH)
    (pid,) = rule.pids
    os.kill(pid, signal.SIGKILL)
    while rule._sandboxes[0].alive:
        pass
    assert score(rule, LENGTH) == 3.0
    assert rule.pids != [pid]


@pytest.mark.parametrize("rows_before", [0, 1])
def test_a_hanging_rule_is_killed_at_its_deadline_whichever_row_it_hangs_in(
    open_rule: Callable[..., SandboxPool], rows_before: int
):
    rule = open_rule("rules_to_obey:obey", timeout_seconds=0.5)
    for _ in range(rows_before):
        score(rule, LENGTH)
    hanging = [*rule.pids]
    began = time.monotonic()
    with pytest.raises(NoScore, match=r"gave no answer within 0\.5 s"):
        score(rule, ask("hang"))
    assert time.monotonic() - began < 20  # includes the start of the process
    assert rule.pids == []
    assert all(map(ends, hanging))
    assert score(rule, LENGTH) == 3.0


def test_a_rule_that_takes_more_memory_than_allowed_fails_its_row_and_what_it_leaked_goes_with_it(
    open_rule: Callable[..., SandboxPool],
):
    rule = open_rule("rules_to_obey:obey", memory_bytes=1 << 30, retries=1)
    with pytest.raises(NoScore, match=f"out of memory: failures.reward_memory_bytes = {1 << 30}"):
        score(rule, ask("take much memory"))
    assert [score(rule, ask("take memory")) for _ in range(6)] == [0.5] * 6, "1.5 GB, in two processes"


def test_a_rule_that_prints_more_than_allowed_fails_its_row(
    open_rule: Callable[..., SandboxPool], capfd: pytest.CaptureFixture[str]
):
    rule = open_rule("rules_to_obey:obey", output_bytes=200_000)
    with pytest.raises(NoScore, match=r"printed more than failures\.reward_output_bytes = 200000 in a call"):
        score(rule, ask("print much"))
    assert 200_000 <= capfd.readouterr().err.count("noise") * 5 < 600_000, "what it printed until then is shown"
    for _ in range(3):
        assert score(rule, ask("print")) == 0.5
    assert capfd.readouterr().err.count("noise") == 12
    unlimited = open_rule("rules_to_obey:obey")
    assert score(unlimited, ask("print much")) == 0.5


def test_texts_larger_than_a_pipe_arrive_whole(rule: SandboxPool):
    assert score(rule, RuleRow("length", "ä" * 1_000_000, "")) == 1_000_000


def test_close_leaves_no_process_behind_not_even_those_that_the_rule_started(open_rule: Callable[..., SandboxPool]):
    rule = open_rule("rules_to_obey:obey")
    pids = [int(score(rule, ask("pid"))), int(score(rule, ask("start")))]
    assert all(is_running(pid) for pid in pids)
    rule.close()
    assert all(ends(pid) for pid in pids)
    rule.close()  # closing twice is harmless


def test_the_child_leaves_when_its_requests_end(open_rule: Callable[..., SandboxPool]):
    rule = open_rule("exact_match")
    score(rule, LENGTH)
    (sandbox,) = rule._sandboxes
    sandbox._in.close()
    assert ends(sandbox.pid)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_module_that_nobody_wrote", "No module named 'a_module_that_nobody_wrote'"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("", "has no function 'obey'"),
    ],
)
def test_a_module_that_does_not_load_tells_every_row_why(
    folder: Path, open_rule: Callable[..., SandboxPool], source: str, cause: str
):
    (folder / "rules_that_fail.py").write_text(source)
    rule = open_rule("rules_that_fail:obey")
    for _ in range(2):
        with pytest.raises(RuleFailed, match=cause):
            rule.score([LENGTH])
        assert rule.pids == [], "no process is left, and none is started again"


def test_a_slow_import_counts_against_the_start_not_the_first_row(folder: Path, open_rule: Callable[..., SandboxPool]):
    (folder / "rules_in_no_hurry.py").write_text("import time; time.sleep(1)\ndef obey(*texts): return 1\n")
    assert score(open_rule("rules_in_no_hurry:obey", timeout_seconds=0.5), LENGTH) == 1.0


def test_an_import_that_never_ends_is_given_up(
    folder: Path, open_rule: Callable[..., SandboxPool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.5)
    (folder / "rules_for_ever.py").write_text("import time; time.sleep(600)\n")
    rule = open_rule("rules_for_ever:obey")
    with pytest.raises(RuleFailed, match=r"was not ready within 0\.5 s"):
        rule.score([RuleRow("", "x" * 1_000_000, "")])
    assert rule.pids == []
