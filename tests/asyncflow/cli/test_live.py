"""The live view prints plain lines without a terminal, and a panel on a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

import msgspec
import pytest
from rich.console import Console

from asyncflow.cli.live import HISTORY, Board, live_view, panel, sparkline
from protocols.control.events import (
    CheckpointWritten,
    CodeRefused,
    CodeReloaded,
    Evaluated,
    Event,
    Published,
    RunEnded,
    RunStarted,
    SamplesEnded,
    ServiceReplaced,
    ServiceSilent,
    Stalled,
    StateChanged,
    StepCommitted,
    WaitsChanged,
    Warned,
)
from protocols.weights import Version

STARTED = RunStarted(run="sort [8]", folder="/runs/sort", steps=60)
WAITING = WaitsChanged(
    waits={"policy.update#1": "3 prompts on generator"}, live_prompts=33, step_progress=0.5, tokens_per_second=1234.0
)


def committed(step: int, reward: float = 0.5) -> StepCommitted:
    return StepCommitted(
        step=step,
        version=f"0.{step}",
        seconds=2.0,
        samples=256,
        tokens_generated=2048,
        reward_mean=reward,
        kl=0.0123,
        loss=-0.02,
        staleness_max=1,
        staleness_mean=0.5,
        metrics={
            "policy.mismatch_mean": 1.2e-6,
            "policy.mismatch_max": 0.000015,
            "response_length_mean": 8.04,
            "response_length_p95": 12.0,
            "response_cut": 0.25,
        },
    )


def plain(events: Sequence[Event]) -> list[str]:
    out = io.StringIO()
    with live_view(Console(file=out, width=60)) as show:
        for event in events:
            show(event)
    return out.getvalue().splitlines()


def rendered(board: Board) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(panel(board))
    return out.getvalue()


def board_of(*events: Event) -> Board:
    board = Board()
    for event in events:
        board.take(event)
    return board


def test_without_a_terminal_each_step_is_one_line_however_narrow_it_is():
    lines = plain([STARTED, *(committed(step) for step in (1, 2, 3)), WAITING])
    assert lines[0] == "run sort [8]: 60 steps, in /runs/sort"
    assert [line.split()[1] for line in lines[1:]] == ["1/60", "2/60", "3/60"]
    assert lines[1] == (
        "step 1/60  reward 0.5000  kl 0.0123  loss -0.0200  staleness 1  samples 256  1024 tokens/s  2.00 s"
    )


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            RunStarted(run="r", folder="/f", steps=9, first_step=4),
            "run r: 9 steps, 4 of them done before, in /f",
        ),
        (
            Evaluated(step=20, metric="exact_match", value=0.25, samples=200),
            "evaluation at step 20: exact_match 0.2500 over 200 samples",
        ),
        (
            CheckpointWritten(step=20, path="/f/step_20", seconds=0.5, nbytes=2_500_000),
            "checkpoint of step 20: /f/step_20, 2.5 MB in 0.50 s",
        ),
        (SamplesEnded(state="failed", reason="reward [timed] out", count=3), "3 samples failed: reward [timed] out"),
        (SamplesEnded(state="failed", reason="two\nlines", count=1), "1 samples failed: two lines"),
        (StateChanged(state="paused"), "the run is paused"),
        (
            CodeReloaded(step=3, digests={"mine": "0123456789abcdef"}),
            "code reloaded after step 3: mine 0123456789abcdef",
        ),
        (
            CodeRefused(step=3, digests={"mine": "0"}, error="mine.py:1 raised\nSyntaxError"),
            "code refused after step 3, the old code stays in use: mine.py:1 raised SyntaxError",
        ),
        (
            Stalled(seconds=61.0, graph=["a waits on b", "b waits on a"]),
            "no progress for 61 s: a waits on b; b waits on a",
        ),
        (Warned(step=3, text="all 4 rewards are 0"), "warning: all 4 rewards are 0"),
        (
            ServiceReplaced(service="reward", number=1, cause="reward: its process\nis gone", seconds=2.0),
            "reward died and was replaced in 2.0 s: reward: its process is gone; its log: logs/reward.log",
        ),
        (ServiceSilent(service="critic", seconds=60.0, ended=False), "critic has not answered for 60 s"),
        (
            ServiceSilent(service="reward", seconds=60.0, ended=True),
            "reward has not answered for 60 s, so it is killed",
        ),
        (RunEnded(outcome="finished", step=60), "run finished after step 60"),
        (RunEnded(outcome="failed", step=7, error="critic died", exit_code=1), "run failed after step 7: critic died"),
    ],
)
def test_what_matters_besides_steps_is_one_line_each(event: Event, line: str):
    assert plain([event]) == [line]


def test_a_warning_of_the_start_is_printed_once_on_any_console():
    started = RunStarted(run="r", folder="/f", steps=9, warnings=["a newer checkpoint can't be used: it is damaged"])
    for terminal in (False, True):
        out = io.StringIO()
        with live_view(Console(file=out, width=200, force_terminal=terminal)) as show:
            show(started)
        assert out.getvalue().count("a newer checkpoint can't be used: it is damaged") == 1


def test_what_changes_all_the_time_is_no_line():
    assert plain([WAITING, Published(version=Version(0, 1), nbytes=10, seconds=0.1)]) == []


def test_the_panel_says_how_far_how_well_how_fast_and_who_waits():
    text = rendered(
        board_of(
            STARTED,
            Evaluated(step=0, metric="exact_match", value=0.2, samples=200),
            committed(1, reward=0.1),
            committed(2, reward=0.9),
            Evaluated(step=2, metric="exact_match", value=0.4, samples=200),
            SamplesEnded(state="dropped", reason="stale", count=2),
            SamplesEnded(state="dropped", reason="stale", count=1),
            WAITING,
        )
    )
    for words in (
        "sort [8]",
        "step 2/60",
        "1 min 56 s left",
        "0.9000  ▁█",
        "8.0 tokens, 95% have 12 at most, 25% cut by max_tokens",
        "engine and trainer differ by 1.2e-06 nats a token, 1.5e-05 at most",
        "exact_match 0.4000, from 0.2000",
        "1,234 tokens/s",
        "staleness 1 versions at most, 0.50 on average",
        "33 live",
        "50% complete",
        "3 dropped: stale",
        "waits for 3 prompts on generator",
    ):
        assert words in text


def test_the_panel_can_be_drawn_before_anything_is_known_and_after_the_end():
    assert "step 0/0" in rendered(Board())
    assert "finished" in rendered(board_of(STARTED, committed(60), WAITING, RunEnded(outcome="finished", step=60)))


def test_a_resumed_run_goes_on_where_it_was():
    assert "step 30/60" in rendered(board_of(RunStarted(run="r", folder="/f", steps=60, first_step=30)))


def test_on_a_terminal_the_last_panel_and_what_went_wrong_stay_on_the_screen():
    out = io.StringIO()
    with live_view(Console(file=out, force_terminal=True, width=100)) as show:
        for event in (STARTED, committed(1), SamplesEnded(state="failed", reason="no answer", count=1)):
            show(event)
        show(RunEnded(outcome="failed", step=1, error="critic died"))
    text = out.getvalue()
    assert "1 samples failed: no answer" in text
    assert "run failed after step 1: critic died" in text
    assert "step 1/60" in text


def test_the_board_remembers_only_what_the_sparkline_shows():
    board = board_of(STARTED, *(committed(step) for step in range(1, 500)))
    assert len(board.rewards) == HISTORY


def test_a_sparkline_scales_from_lowest_to_highest_and_skips_what_is_not_finite():
    assert sparkline([0.0, 0.5, float("nan"), 1.0]) == "▁▅ █"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def test_the_panel_shows_entropy_gradients_tokens_memory_and_the_time_that_has_passed():
    metrics = {"policy.entropy": 1.25, "policy.gradient_norm": 0.5, "tokens_total": 123456.0}
    metrics |= {"memory.controller_resident_bytes": 0.5e9, "memory.policy_resident_bytes": 2.25e9}
    metrics |= {"memory.policy_device_bytes": 40e9}
    board = board_of(STARTED, msgspec.structs.replace(committed(1), metrics=metrics))
    board.began -= 90.0
    page = rendered(board)
    for text in (
        "entropy 1.25   gradient norm 0.5",
        "123,456 tokens so far",
        "policy 2.2 + 40.0, controller 0.5 GB",
        "1 min 30 s elapsed, 1 min 58 s left",
    ):
        assert text in page, page
