"""The watchdog reports waits that change, a stall with its wait graph, and the end of a stall that is too long."""

from __future__ import annotations

import re

import pytest

from asyncflow.control.settings import Deadlines
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.wait_graph import WaitBoard
from asyncflow.control.supervision.watchdog import Watchdog
from protocols.control.events import Event, Stalled, WaitsChanged
from protocols.control.notices import Waiting


class Services:
    """What a watchdog asks its supervisor for."""

    def __init__(self) -> None:
        self.waits, self.idle_seconds, self.silences = WaitBoard(), 0.0, self

    def elapse(self, seconds: float) -> list[Event]:
        return []

    def current_waits(self) -> dict[str, str]:
        return self.waits.current()

    def graph(self) -> list[str]:
        return self.waits.graph(now=100.0)


def watchdog(services: Services) -> Watchdog:
    return Watchdog(services, Deadlines(stall=10.0, give_up=20.0))  # type: ignore[arg-type]


def check(of: Watchdog) -> list[Event]:
    return list(of.check(live_prompts=3, step_progress=0.5, paused=False))


def test_waits_are_reported_when_they_change():
    services = Services()
    watched = watchdog(services)
    assert len(check(watched)) == 1
    assert check(watched) == []
    services.waits.note(Waiting("reward.score#1", "rows", "policy.generate#1", 90.0))
    (changed,) = check(watched)
    assert isinstance(changed, WaitsChanged)
    assert changed.waits == {"reward.score#1": "rows on policy.generate#1"}
    assert check(watched) == []
    watched.generated(tokens=7)
    (moving,) = check(watched)
    assert isinstance(moving, WaitsChanged)
    assert moving.tokens_per_second > 0


def test_a_stall_in_which_nobody_waits_blames_nobody():
    services = Services()
    services.idle_seconds = 11.0
    stalls = [event for event in check(watchdog(services)) if isinstance(event, Stalled)]
    assert [stall.graph for stall in stalls] == [["no service waits for another: each is computing"]]


def test_a_stall_that_is_too_long_names_the_deadline_that_ends_it():
    services = Services()
    services.idle_seconds = 21.0
    with pytest.raises(RunFailed, match=re.escape("nothing moved for 21 s (deadlines.give_up = 20):")):
        check(watchdog(services))
