"""What is shown while a run starts: the phase, which services load for how long, and one line when it has started."""

from __future__ import annotations

import re
import time

import pytest
from rich.console import Console

from asyncflow.cli.start_view import current, start_view, summary
from asyncflow.run.launch import launch
from asyncflow.run.start_progress import StartProgress
from asyncflow.services.runtime import Load
from tests.asyncflow.conftest import MakeRecipe


@pytest.fixture
def progress() -> StartProgress:
    now = time.monotonic()
    loads = {"reward": Load(now - 9.0, 0.5), "policy": Load(now - 8.0)}
    return StartProgress("loads models", now - 12.0, loads)


def test_a_service_loads_until_it_is_ready(progress: StartProgress):
    assert current(progress, progress.began + 12.0).plain.splitlines() == [
        "loads models  12 s",
        "  reward       ready after 0.5 s",
        "  policy       loads, 8 s",
    ]


def test_the_slowest_service_is_named_first_at_the_end(progress: StartProgress):
    assert re.fullmatch(r"started in [\d.]+ s: reward 0\.5 s, policy 0\.0 s", summary(progress))


def printed(progress: StartProgress | None, *, terminal: bool, starts: bool) -> str:
    console = Console(width=100, force_terminal=terminal)
    with console.capture() as capture, start_view(console, progress) as started:
        if starts:
            started()
    return capture.get()


def test_without_a_terminal_one_line_is_printed_when_it_has_started(progress: StartProgress):
    assert printed(progress, terminal=False, starts=True).startswith("started in ")
    assert printed(progress, terminal=False, starts=False) == ""
    assert printed(None, terminal=True, starts=True) == ""


def test_a_terminal_shows_the_services_that_load(progress: StartProgress):
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(progress, terminal=True, starts=False))
    assert "policy       loads, " in shown


async def test_a_launch_tells_what_it_loads(make_recipe: MakeRecipe):
    progress = StartProgress()
    async with launch(make_recipe(steps=1), progress=progress):
        assert progress.phase == "loads models"
        assert set(progress.loads) == {"policy", "critic", "reference", "reward", "advantage", "evaluator"}
        assert all(load.seconds is not None for load in progress.loads.values())
