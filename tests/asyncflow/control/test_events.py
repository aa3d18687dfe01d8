"""Events are read by cursor: late, returning and concurrent followers see the same events, and all see the end."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.control import events
from asyncflow.control.events import EventLog, Notifier
from protocols.control.events import Event, RunEnded, StateChanged

ENDED = RunEnded(outcome="finished", step=1)
PAUSED, RUNNING = StateChanged(state="paused"), StateChanged(state="running")


async def collect(log: EventLog, cursor: int = 0) -> list[tuple[int, Event]]:
    async with asyncio.timeout(60):  # for the events up to RunEnded
        return [item async for item in log.follow(cursor)]


async def test_a_late_follower_sees_everything():
    log = EventLog()
    for event in (PAUSED, RUNNING, ENDED):
        log.add(event)
    assert await collect(log) == [(1, PAUSED), (2, RUNNING), (3, ENDED)]
    assert log.end == 3


async def test_the_cursor_of_the_last_event_seen_is_where_to_go_on():
    log = EventLog()
    for event in (PAUSED, RUNNING, ENDED):
        log.add(event)
    assert await collect(log, cursor=1) == [(2, RUNNING), (3, ENDED)]


async def test_who_has_seen_the_end_waits_for_nothing_more():
    log = EventLog()
    log.add(ENDED)
    assert await collect(log, cursor=1) == []


async def test_nothing_is_added_after_the_end():
    """Otherwise a follower with the cursor of the end would wait forever."""
    log = EventLog()
    log.add(ENDED)
    log.add(PAUSED)
    assert await collect(log) == [(1, ENDED)]
    assert await collect(log, cursor=1) == []


async def test_a_follower_in_waiting_is_woken_by_each_event():
    log = EventLog()
    first, second = asyncio.create_task(collect(log)), asyncio.create_task(collect(log))
    for event in (PAUSED, RUNNING, ENDED):
        await asyncio.sleep(0)
        log.add(event)
    assert await first == await second == [(1, PAUSED), (2, RUNNING), (3, ENDED)]


async def test_a_slow_follower_misses_nothing():
    log = EventLog()
    log.add(PAUSED)
    seen = []
    async with asyncio.timeout(60):
        async for _, event in log.follow():
            seen.append(event)
            if len(seen) == 1:
                log.add(RUNNING)
                log.add(ENDED)
    assert seen == [PAUSED, RUNNING, ENDED]


async def test_a_follower_that_leaves_does_not_disturb_another():
    log = EventLog()
    left = asyncio.create_task(collect(log))
    stays = asyncio.create_task(collect(log))
    await asyncio.sleep(0)
    left.cancel()
    log.add(ENDED)
    assert await stays == [(1, ENDED)]


async def test_the_oldest_events_fall_off_and_cursors_still_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "MAX_EVENTS", 2)
    log = EventLog()
    for event in (PAUSED, RUNNING, PAUSED, ENDED):
        log.add(event)
    assert await collect(log, cursor=0) == [(3, PAUSED), (4, ENDED)]
    assert await collect(log, cursor=3) == [(4, ENDED)]


async def test_a_pulse_wakes_everybody_and_only_once():
    pulse = Notifier()
    waiting = [asyncio.create_task(pulse.changed()) for _ in range(3)]
    await asyncio.sleep(0)
    pulse.notify()
    async with asyncio.timeout(60):  # for the three waiters
        await asyncio.gather(*waiting)
    again = asyncio.create_task(pulse.changed())
    await asyncio.sleep(0)
    assert not again.done(), "the next beat is another one"
    again.cancel()
