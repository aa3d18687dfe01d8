"""Rows of a rule that are scored side by side: in several processes, together in an async rule, or as one batch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.rewards import sandbox, sandbox_pool
from workers.rewards.arguments import RuleRow
from workers.rewards.sandbox_pool import SandboxPool

SIDE_BY_SIDE = """
import asyncio, os, time
from pathlib import Path

HERE = Path(__file__).parent

def nap(prompt, response, reference):
    time.sleep(0.05)
    return os.getpid()

def obey(response):
    with (HERE / f"tried-{response}").open("a") as file:
        file.write("x")
    match response.partition("-")[0]:
        case "hang": time.sleep(600)
        case "exit": os._exit(3)
        case "refused": raise ConnectionRefusedError("judge is away")
        case "busy" if (HERE / f"tried-{response}").stat().st_size < 3: raise Busy()
        case "wrong": return "good"
        case "raise": raise ValueError("no")
    return 1.0

def quick(response):
    return 1.0 if response[0] in "ax" else obey(response)

class Busy(Exception):
    status_code = 429

async def obey_async(response):
    if response.startswith("late"):
        await asyncio.sleep(600)
    await asyncio.sleep(0.05)
    return obey(response)

def obey_all(responses):
    return [obey(response) for response in responses]

def two(responses):
    return [1.0, 2.0]

def one_number(responses):
    return 1.0

async def obey_all_async(responses, **columns):
    return list(await asyncio.gather(*(obey_async(response) for response in responses)))
"""


@pytest.fixture
def pool_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SandboxPool]]:
    (tmp_path / "rules_side_by_side.py").write_text(SIDE_BY_SIDE)
    monkeypatch.syspath_prepend(tmp_path)
    opened: list[SandboxPool] = []

    def start(function: str, **options: Any) -> SandboxPool:
        opened.append(SandboxPool(f"rules_side_by_side:{function}", **{"timeout_seconds": 20, **options}))
        return opened[-1]

    yield start
    for pool in opened:
        pool.close()


def rows(*responses: str) -> list[RuleRow]:
    return [RuleRow("", response, "") for response in responses]


def results(pool: SandboxPool, *responses: str) -> dict[str, float | str]:
    """The score of each response, or the cause of its absence."""
    answers = pool.score(rows(*responses))
    return {r: a.error if a.score is None else a.score for r, a in zip(responses, answers, strict=True)}


def test_slow_rows_are_scored_by_several_processes_and_quick_ones_by_one(pool_of: Callable[..., SandboxPool]):
    slow, quick = pool_of("nap", concurrency=3), pool_of("obey", concurrency=3)
    pids = {int(answer.score or 0) for answer in slow.score(rows(*"x" * 60))}
    assert pids == set(slow.pids)
    assert 1 < len(pids) <= 3
    quick.score(rows("a"))
    results(quick, *"abcdefgh")
    assert len(quick.pids) == 1


@pytest.mark.parametrize("function", ["obey", "obey_async", "obey_all", "obey_all_async"])
@pytest.mark.parametrize(
    ("bad", "cause"), [("exit", "ended its process, exit code 3"), ("raise", "raised ValueError: no")]
)
def test_a_bad_row_costs_no_other_row_whatever_form_the_rule_has(
    pool_of: Callable[..., SandboxPool], function: str, bad: str, cause: str
):
    assert results(pool_of(function, concurrency=3), "a", "b", bad, "c") == {"a": 1, "b": 1, bad: cause, "c": 1}


@pytest.mark.parametrize("function", ["obey", "obey_async", "obey_all"])
def test_a_hanging_row_costs_no_other_row_and_is_ended_at_its_deadline(
    pool_of: Callable[..., SandboxPool], monkeypatch: pytest.MonkeyPatch, function: str
):
    monkeypatch.setattr(sandbox_pool, "BLOCKED_SECONDS", 0.0)
    pool = pool_of(function, concurrency=2, timeout_seconds=1.0)
    cause = "gave no answer within 1 s"
    assert results(pool, "a", "hang", "b", "c") == {"a": 1, "hang": cause, "b": 1, "c": 1}


def test_rows_that_wait_in_a_process_are_not_to_blame_for_its_end(pool_of: Callable[..., SandboxPool]):
    pool = pool_of("quick", timeout_seconds=0.5)
    pool.score(rows(*"x" * 20))
    responses = [f"a{n}" for n in range(8)]
    causes = {"exit": "ended its process, exit code 3", "hang": "gave no answer within 0.5 s"}
    found = results(pool, "a", "exit", *responses[:4], "hang", *responses[4:])
    assert found == {"a": 1, **dict.fromkeys(responses, 1), **causes}


def test_a_process_that_dies_as_it_is_given_a_row_is_replaced(
    pool_of: Callable[..., SandboxPool], monkeypatch: pytest.MonkeyPatch
):
    pool = pool_of("obey", retries=1)
    pool.score(rows("a"))
    monkeypatch.setattr(sandbox.Sandbox, "alive", True)  # it has not been noticed
    os.kill(pool.pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pool.pids[0], os.WEXITED | os.WNOWAIT)
    assert results(pool, "b") == {"b": 1}


def test_a_late_row_of_an_async_rule_ends_without_its_process(pool_of: Callable[..., SandboxPool]):
    pool = pool_of("obey_async", concurrency=8, timeout_seconds=0.3)
    pool.start()
    pids = pool.pids
    assert results(pool, "a", "late", "b") == {"a": 1, "late": "gave no answer within 0.3 s", "b": 1}
    assert pool.pids == pids


def test_rows_of_an_async_rule_wait_together_up_to_the_bound(pool_of: Callable[..., SandboxPool]):
    pool = pool_of("obey_async", concurrency=16)
    pool.start()
    began = time.monotonic()
    pool.score(rows(*"x" * 32))
    assert 0.1 <= time.monotonic() - began < 1.0, "32 rows of 50 ms, 16 at a time"
    assert len(pool.pids) == 1


def test_a_busy_judge_is_tried_again_later_and_a_wrong_value_never(pool_of: Callable[..., SandboxPool], tmp_path: Path):
    pool = pool_of("obey", retries=2, backoff_seconds=0.1)
    began = time.monotonic()
    assert results(pool, "busy", "wrong", "raise", "refused", "a") == {
        "busy": 1,
        "wrong": "returned 'good', want a number, or a dictionary of numbers",
        "raise": "raised ValueError: no",
        "refused": "raised ConnectionRefusedError: judge is away",
        "a": 1,
    }
    assert time.monotonic() - began >= 0.15, "half of 0.1 s, then half of 0.2 s"
    tries = {path.name.removeprefix("tried-"): path.stat().st_size for path in tmp_path.glob("tried-*")}
    assert tries == {"busy": 3, "wrong": 1, "raise": 3, "refused": 3, "a": 1}


def test_a_batch_rule_gets_all_rows_at_once_and_has_to_answer_each(pool_of: Callable[..., SandboxPool]):
    assert [answer.score for answer in pool_of("two").score(rows("a", "b"))] == [1.0, 2.0]
    assert set(results(pool_of("two"), "a", "b", "c").values()) == {"returned 2 values for a batch of 3"}
    assert set(results(pool_of("one_number"), "a", "b").values()) == {
        "returned 1.0 for a batch, want a list of 2 numbers"
    }
